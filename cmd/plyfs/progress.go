package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/plyfs/plyfs/layers"
)

func isTTY(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// progress shows one bar per layer or file on a terminal, and nothing
// elsewhere: what is printed for programs stays clean.
type progress struct {
	p    *mpb.Progress
	mu   sync.Mutex
	bars map[string]*bar // guarded by mu
}

type bar struct {
	*mpb.Bar
	mu     sync.Mutex
	action string // guarded by mu
	total  int64
	done   bool
}

// patience is how long a command may be silent on a terminal.
const patience = time.Second

// tellSlow says on a terminal what a command is about, if it is not done soon. The caller
// calls done at the end.
func tellSlow(msg string) (done func()) {
	if !isTerminal(os.Stderr) {
		return func() {}
	}
	t := time.AfterFunc(patience, func() { tell(msg) })
	return func() { t.Stop() }
}

// startProgress returns nil callbacks where standard error is no terminal.
func startProgress() *progress {
	if !isTerminal(os.Stderr) {
		return &progress{}
	}
	return &progress{
		p:    mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(40)),
		bars: map[string]*bar{},
	}
}

// callback is what the service is given.
func (p *progress) callback() layers.ProgressFunc {
	if p.p == nil {
		return nil
	}
	return p.update
}

func (p *progress) update(u layers.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.bars[u.ID]
	if b == nil {
		b = p.add(u)
		p.bars[u.ID] = b
	}
	b.mu.Lock()
	b.action = u.Action
	b.mu.Unlock()
	if b.done {
		return
	}
	if u.Total > 0 && u.Total != b.total {
		b.total = u.Total
		b.SetTotal(u.Total, false)
	}
	b.SetCurrent(u.Current)
	if u.Done {
		b.done = true
		b.SetTotal(max(u.Current, 1), false)
		b.SetCurrent(max(u.Current, 1))
		b.SetTotal(-1, true)
	}
}

func (p *progress) add(u layers.Progress) *bar {
	b := &bar{action: u.Action, total: u.Total}
	name := printable(shorten(u.ID, 24))
	if len(u.ID) >= 32 && strings.Trim(u.ID, "0123456789abcdef") == "" {
		name = shortID(u.ID)
	}
	b.Bar = p.p.New(u.Total,
		mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
		mpb.PrependDecorators(
			decor.Name(name, decor.WCSyncSpaceR),
			decor.Any(func(decor.Statistics) string {
				b.mu.Lock()
				defer b.mu.Unlock()
				return printable(b.action)
			}, decor.WCSyncSpaceR),
		),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			if s.Total <= 0 || s.Completed {
				return size(s.Current)
			}
			return fmt.Sprintf("%s/%s", size(s.Current), size(s.Total))
		})),
	)
	return b
}

// finish leaves the bars as they are and gives the terminal back.
func (p *progress) finish() {
	if p.p == nil {
		return
	}
	p.mu.Lock()
	for _, b := range p.bars {
		if !b.done {
			b.Abort(false)
		}
	}
	p.mu.Unlock()
	p.p.Wait()
}
