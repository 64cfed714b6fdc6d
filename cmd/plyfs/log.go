package main

import (
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// logLevelEnv carries --log-level to the processes of a mount.
const logLevelEnv = "PLYFS_LOG_LEVEL"

func setLogLevel(level string) { _ = os.Setenv(logLevelEnv, level) } // fails for NUL only

// newLogger is for what runs on its own: JSON to standard error, which is the
// log file of a mount's processes, or where the daemon was told to write.
func newLogger() *zap.Logger {
	cfg := zap.NewProductionEncoderConfig()
	cfg.EncodeTime = zapcore.ISO8601TimeEncoder
	cfg.EncodeDuration = zapcore.StringDurationEncoder
	return loggerOf(zapcore.NewJSONEncoder(cfg)).With(zap.Int("pid", os.Getpid()))
}

// newCommandLogger is for commands: what a person should know, in the form of
// the command's own messages. Fields are JSON, which escapes control characters.
func newCommandLogger() *zap.Logger {
	return loggerOf(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{
		LevelKey: "level", MessageKey: "msg", ConsoleSeparator: " ",
		EncodeDuration: zapcore.StringDurationEncoder,
		EncodeLevel: func(l zapcore.Level, enc zapcore.PrimitiveArrayEncoder) {
			name := l.String()
			if l == zapcore.WarnLevel {
				name = "warning"
			}
			enc.AppendString("plyfs: " + name + ":")
		},
	}))
}

func loggerOf(enc zapcore.Encoder) *zap.Logger {
	level := zapcore.WarnLevel
	if s := os.Getenv(logLevelEnv); s != "" {
		if l, err := zapcore.ParseLevel(s); err == nil {
			level = l
		}
	}
	return zap.New(zapcore.NewCore(enc, zapcore.Lock(os.Stderr), level))
}
