package holder

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/plyfs/plyfs/mountd/events"
	"github.com/plyfs/plyfs/unionfs"
	"github.com/plyfs/plyfs/unionfs/transport"
)

// Spec says everything about one mount. It is resolved: absolute paths only,
// no names of images or containers.
type Spec struct {
	// ID names the mount in logs.
	ID string `json:"id,omitempty"`
	// Target is the absolute, symlink-free mount point.
	Target string `json:"target"`

	// Lowers[0] is the topmost.
	Lowers []unionfs.Layer `json:"lowers"`
	// Chain and ChainID name the chain index of the lowers, if there is one.
	Chain   string `json:"chain,omitempty"`
	ChainID string `json:"chainID,omitempty"`
	// Upper and Work are both empty in a read-only union.
	Upper unionfs.Layer `json:"upper"`
	Work  string        `json:"work,omitempty"`

	Redirect unionfs.Redirect `json:"redirect,omitempty"`
	Metacopy bool             `json:"metacopy,omitempty"`
	NoIndex  bool             `json:"noIndex,omitempty"`
	IO       unionfs.IO       `json:"io,omitempty"`
	Volatile bool             `json:"volatile,omitempty"`
	// TakeUnsynced is as in unionfs.Options.
	TakeUnsynced bool `json:"takeUnsynced,omitempty"`

	// As in unionfs.Options.
	Owners       unionfs.Owners `json:"owners,omitzero"`
	Timeout      time.Duration  `json:"timeout,omitempty"`
	StaticNlink  bool           `json:"staticNlink,omitempty"`
	CountSubdirs bool           `json:"countSubdirs,omitempty"`
	ShortInodes  bool           `json:"shortInodes,omitempty"`
	NoXattrs     bool           `json:"noXattrs,omitempty"`
	NoACL        bool           `json:"noACL,omitempty"`
	NoDevices    bool           `json:"noDevices,omitempty"`

	// Complete is as in unionfs.Options.
	Complete bool `json:"complete,omitempty"`

	// Labels are what people call the lowers, if they have names of their own.
	Labels []string `json:"labels,omitempty"`
	// TellLayers is as in unionfs.Options.
	TellLayers bool `json:"tellLayers,omitempty"`
	// History, if set, is the file for a history of what is copied up (trace.History).
	History string `json:"history,omitempty"`

	// Comm, if set, is the name of the holder's process.
	Comm        string `json:"comm,omitempty"`
	FSName      string `json:"fsName,omitempty"`
	Subtype     string `json:"subtype,omitempty"`
	ReadOnly    bool   `json:"readOnly,omitempty"`
	AllowOther  bool   `json:"allowOther,omitempty"`
	NoSuid      bool   `json:"noSuid,omitempty"`
	NoDev       bool   `json:"noDev,omitempty"`
	NoExec      bool   `json:"noExec,omitempty"`
	NoAtime     bool   `json:"noAtime,omitempty"`
	StrictAtime bool   `json:"strictAtime,omitempty"`
	NoDirAtime  bool   `json:"noDirAtime,omitempty"`

	// Spin is as in transport.ServeOptions.
	Spin time.Duration `json:"spin,omitempty"`
	// GoFuse serves by go-fuse's own loop.
	GoFuse bool `json:"goFuse,omitempty"`
	// Debug makes the request loop log every request.
	Debug bool `json:"debug,omitempty"`
	// Bound: the mount ends with the process that has asked for it.
	Bound bool `json:"bound,omitempty"`
	// RunDir, if set, is an existing directory for state.json, exit.json and the sockets [StatsFile]
	// and [ControlFile].
	RunDir string `json:"runDir,omitempty"`
	// OwnRunDir: nobody but the processes of the mount has a use for RunDir; they remove it.
	OwnRunDir bool `json:"ownRunDir,omitempty"`
	// Limits of the server.
	Limits Limits `json:"limits,omitzero"`
	// Events, if set, is where to tell what becomes of the mount.
	Events *EventSource `json:"events,omitempty"`
}

// EventSource is what events of a mount have in common.
type EventSource struct {
	Dir   string            `json:"dir"` // of the log, see package events
	Mount events.MountEvent `json:"mount"`
}

// Validate reports what no process could serve.
func (s *Spec) Validate() error {
	switch {
	case !filepath.IsAbs(s.Target):
		return fmt.Errorf("mount point %q is not an absolute path", s.Target)
	case s.Limits.Validate() != nil:
		return s.Limits.Validate()
	case len(s.Lowers) == 0 && s.Upper.Path == "":
		return errors.New("a mount needs at least one layer")
	case (s.Upper.Path == "") != (s.Work == ""):
		return errors.New("upper and work directory belong together: one of them is missing")
	}
	for _, p := range s.paths() {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("layer %q is not an absolute path", p)
		}
	}
	return nil
}

// paths returns every directory of the union.
func (s *Spec) paths() []string {
	ps := make([]string, 0, len(s.Lowers)+2)
	for _, l := range s.Lowers {
		ps = append(ps, l.Path)
	}
	if s.Upper.Path != "" {
		ps = append(ps, s.Upper.Path, s.Work)
	}
	return ps
}

func (s *Spec) unionOptions() unionfs.Options {
	atime := unionfs.AtimeRelative
	switch {
	case s.NoAtime:
		atime = unionfs.AtimeNever
	case s.StrictAtime:
		atime = unionfs.AtimeStrict
	}
	return unionfs.Options{
		Lowers:       s.Lowers,
		Chain:        s.Chain,
		ChainID:      s.ChainID,
		Upper:        s.Upper.Path,
		UpperDialect: s.Upper.Dialect,
		Work:         s.Work,
		Redirect:     s.Redirect,
		Metacopy:     s.Metacopy,
		NoIndex:      s.NoIndex,
		Atime:        atime,
		NoDirAtime:   s.NoDirAtime,
		IO:           s.IO,
		Volatile:     s.Volatile,
		TakeUnsynced: s.TakeUnsynced,
		Override:     s.Upper.Override,
		Owners:       s.Owners,
		Timeout:      s.Timeout,
		StaticNlink:  s.StaticNlink,
		CountSubdirs: s.CountSubdirs,
		ShortInodes:  s.ShortInodes,
		NoXattrs:     s.NoXattrs,
		NoACL:        s.NoACL,
		NoDevices:    s.NoDevices,
		Complete:     s.Complete,
		TellLayers:   s.TellLayers,
	}
}

func (s *Spec) mountOptions() transport.MountOptions {
	return transport.MountOptions{
		Target:      s.Target,
		FSName:      s.FSName,
		Subtype:     s.Subtype,
		ReadOnly:    s.ReadOnly,
		AllowOther:  s.AllowOther,
		NoSuid:      s.NoSuid,
		NoDev:       s.NoDev,
		NoExec:      s.NoExec,
		NoAtime:     s.NoAtime,
		StrictAtime: s.StrictAtime,
		NoDirAtime:  s.NoDirAtime,
	}
}

// State is what a live mount says about itself in RunDir/state.json.
type State struct {
	Target string  `json:"target"`
	Holder Process `json:"holder"`
	Server Process `json:"server"`
	// Major and Minor are the device number of the mounted file system: it
	// finds the mount again when a directory above the target is renamed.
	Major int `json:"major"`
	Minor int `json:"minor"`
	// Restarts counts the servers that have taken over from one that had died.
	Restarts int `json:"restarts,omitempty"`
	// Refused counts the requests that were answered with EIO because two servers have
	// ended while they answered them.
	Refused int `json:"refused,omitempty"`
	// Ended: the mount has ended, and its event is written.
	Ended bool `json:"ended,omitempty"`
}

// Exit is left in RunDir/exit.json by a holder whose mount did not end well.
type Exit struct {
	Error string `json:"error"`
}

const (
	stateFile = "state.json"
	exitFile  = "exit.json"
	// LogFile is the name of the log in a run directory.
	LogFile = "log"
)

// ReadState returns the state recorded in a run directory.
func ReadState(runDir string) (State, error) {
	var st State
	err := readJSON(filepath.Join(runDir, stateFile), &st)
	return st, err
}

// ReadExit returns what a holder left behind, or nil if its end was clean.
func ReadExit(runDir string) error {
	var e Exit
	if err := readJSON(filepath.Join(runDir, exitFile), &e); err != nil {
		return nil //nolint:nilerr // no file: a clean end
	}
	return errors.New(e.Error)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// writeJSON replaces path at once: a reader sees the old or the new content.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
