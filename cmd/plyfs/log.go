package main

import (
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// logLevelEnv carries --log-level to the processes of a mount.
const logLevelEnv = "PLYFS_LOG_LEVEL"

func setLogLevel(level string) { _ = os.Setenv(logLevelEnv, level) } // fails for NUL only

// newLogger writes to standard error: the log file of a mount's processes, the
// terminal of a command.
func newLogger() *zap.Logger {
	level := zapcore.WarnLevel
	if s := os.Getenv(logLevelEnv); s != "" {
		if l, err := zapcore.ParseLevel(s); err == nil {
			level = l
		}
	}
	cfg := zap.NewProductionEncoderConfig()
	cfg.EncodeTime = zapcore.ISO8601TimeEncoder
	cfg.EncodeDuration = zapcore.StringDurationEncoder
	core := zapcore.NewCore(zapcore.NewJSONEncoder(cfg), zapcore.Lock(os.Stderr), level)
	return zap.New(core).With(zap.Int("pid", os.Getpid()))
}
