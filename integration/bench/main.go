package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plyfs/plyfs/integration/harness"
)

const usageText = `Usage: go run ./integration/bench [FLAGS]        (or: make bench)

Compares plyfs with kernel overlayfs, other unions and the plain directory, on
this machine. It needs root, makes all layers by itself, and removes them again.
Figures are medians; ratios are speed relative to kernel overlayfs, more is faster.

Examples:
  go run ./integration/bench -list                       what there is
  go run ./integration/bench -quick                      everything, small, one round
  go run ./integration/bench -phases '^walk|^small' -systems '^(kernel|plyfs)' -rounds 7
  go run ./integration/bench -rounds 0 -phases chmod     count requests only
  go run ./integration/bench -base /tmp/plyfs.old -systems '^(kernel|plyfs)$' -phases names
  go run ./integration/bench -compare docs/benchmarks.json -phases names

Flags:
`

// config is what the flags say.
type config struct {
	rounds   int
	phases   string
	systems  string
	quick    bool
	dirs     string
	tmpfs    bool
	out      string
	save     bool
	compare  string
	list     bool
	counts   bool
	goals    bool
	install  bool
	options  string
	base     string
	limit    time.Duration
	progress bool
}

func parseFlags(args []string, w io.Writer) (*config, error) {
	c := &config{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(w)
	f.Usage = func() {
		fmt.Fprint(w, usageText)
		f.PrintDefaults()
	}
	f.IntVar(&c.rounds, "rounds", 0, "how often everything is timed (default 5; with -quick 1; 0 given: only count requests)")
	f.StringVar(&c.phases, "phases", "", "regular expression: only phases, scenes or tables whose name it matches")
	f.StringVar(&c.systems, "systems", "", "regular expression: only systems whose name it matches")
	f.BoolVar(&c.quick, "quick", false, "small sizes, one round: shows that everything works, not how fast")
	f.StringVar(&c.dirs, "dir", ".cache", "where layers and uppers lie; several, separated by commas, are compared")
	f.BoolVar(&c.tmpfs, "tmpfs", true, "measure on a tmpfs, too")
	f.StringVar(&c.out, "out", "bin/bench", "directory for the results")
	f.BoolVar(&c.save, "save", false, "write the results to docs/, to be committed")
	f.StringVar(&c.compare, "compare", "", "results to compare with (a .json file of another run)")
	f.BoolVar(&c.list, "list", false, "list tables, phases, goals and systems, and do nothing")
	f.BoolVar(&c.counts, "counts", true, "count FUSE requests in an extra round")
	f.BoolVar(&c.goals, "goals", true, "show goals, and whether they are met")
	f.BoolVar(&c.install, "install", true, "install what is compared by apt-get, if missing (not with -quick)")
	f.StringVar(&c.options, "o", "", "more mount options for plyfs, comma separated")
	f.StringVar(&c.base, "base", "", "another plyfs binary, measured beside this one: the way to see what a change brings")
	f.DurationVar(&c.limit, "limit", 5*time.Minute, "time limit for one phase")
	f.BoolVar(&c.progress, "v", false, "show progress line by line")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	given := false
	f.Visit(func(fl *flag.Flag) { given = given || fl.Name == "rounds" })
	if !given {
		c.rounds = 5
		if c.quick {
			c.rounds = 1
		}
	}
	return c, nil
}

func main() {
	switch {
	case os.Getenv(workerEnv) != "":
		exit(runWorker(os.Stdin, os.Stdout))
	case os.Getenv(harness.JanitorEnv) != "":
		exit(harness.RunJanitor(os.Stdin))
	}
	c, err := parseFlags(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, func() {
		stop() // another signal ends this process at once; the janitor cleans up
		abortAll()
	})
	exit(bench(ctx, c, os.Stdout, os.Stderr))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// bench does what the flags say.
func bench(ctx context.Context, c *config, out, log io.Writer) (err error) {
	sz := &fullSizes
	if c.quick {
		sz = &quickSizes
	}
	if c.list {
		fmt.Fprint(out, listing(allTables(sz)))
		for _, s := range systems {
			fmt.Fprintf(out, "system %-20s %s\n", s.Name, s.About)
		}
		return nil
	}
	if os.Geteuid() != 0 || harness.InUserNamespace() {
		return errors.New("needs root of the initial user namespace: it mounts overlayfs and drops caches")
	}
	phases, err := regexp.Compile(c.phases)
	if err != nil {
		return fmt.Errorf("-phases: %w", err)
	}
	chosen, err := regexp.Compile(c.systems)
	if err != nil {
		return fmt.Errorf("-systems: %w", err)
	}
	r := &runner{rounds: c.rounds, counts: c.counts, limit: c.limit, sizes: sz, log: log, res: &results{Format: resultsFormat}}
	if !c.progress {
		r.log = &ticker{w: log}
	}
	if c.base != "" {
		if r.base, err = filepath.Abs(c.base); err != nil {
			return fmt.Errorf("-base: %w", err)
		}
	}
	if c.options != "" {
		r.options = strings.Split(c.options, ",")
	}
	if r.tables, r.wanted = choose(allTables(sz), phases); len(r.tables) == 0 {
		return fmt.Errorf("no phase matches %q: see -list", c.phases)
	}
	var old *results
	if c.compare != "" {
		if old, err = readResults(c.compare); err != nil {
			return err
		}
	}
	janitor, err := harness.StartJanitor()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, janitor.Close()) }()
	if err := r.prepare(ctx, c, chosen, janitor); err != nil {
		return err
	}
	defer func() {
		for _, p := range r.places {
			err = errors.Join(err, p.close())
		}
	}()
	runErr := r.run(ctx)
	if t, ok := r.log.(*ticker); ok {
		t.end()
	}
	r.res.Machine.LoadAfter = loadAverage()
	r.res.derive(r.tables)
	if runErr != nil && c.save {
		fmt.Fprintln(log, "interrupted: nothing is written to docs/")
		c.save = false
	}
	return errors.Join(runErr, r.publish(c, old, out))
}

// prepare builds plyfs, and finds systems and places.
func (r *runner) prepare(ctx context.Context, c *config, chosen *regexp.Regexp, janitor *harness.Janitor) error {
	res := r.res
	res.Date, res.Rounds, res.Quick, res.Options = time.Now().UTC().Format(time.DateTime+" UTC"), c.rounds, c.quick, r.options
	res.Machine = describeMachine()
	module, err := moduleDir(ctx)
	if err != nil {
		return err
	}
	if out, err := run(ctx, "git", "-c", "safe.directory=*", "-C", module, "describe", "--always", "--dirty", "--tags"); err == nil {
		res.Revision = strings.TrimSpace(string(out))
	}
	dirs := strings.Split(c.dirs, ",")
	for _, dir := range dirs {
		p, err := newPlace(dir)
		if err != nil {
			return fmt.Errorf("-dir %s: %w", dir, err)
		}
		for _, other := range r.places {
			if other.Name == p.Name {
				p.Name += "-" + filepath.Base(dir)
			}
		}
		r.places = append(r.places, p)
		if err := janitor.Watch(p.dir); err != nil {
			return err
		}
	}
	if c.tmpfs {
		p, err := newTmpfs(dirs[0])
		if err != nil {
			return err
		}
		r.places = append(r.places, p)
		if err := janitor.Watch(filepath.Dir(p.dir)); err != nil {
			return err
		}
	}
	for _, p := range r.places {
		res.Places = append(res.Places, p.Name)
		res.hide = append(res.hide, p.dir)
	}
	// A binary of its own: somebody may build another one meanwhile.
	r.bin = filepath.Join(r.places[0].dir, "plyfs")
	if err := buildPlyfs(ctx, module, r.bin, res.Revision); err != nil {
		return err
	}
	r.findSystems(ctx, c, chosen)
	if len(r.systems) == 0 {
		return fmt.Errorf("no system matches %q: see -list", c.systems)
	}
	return nil
}

// ticker shows the last line of progress only, on a terminal or not at all.
type ticker struct {
	w     io.Writer
	shown bool
}

func (t *ticker) Write(p []byte) (int, error) {
	if f, ok := t.w.(*os.File); ok && isTerminal(f) {
		fmt.Fprintf(t.w, "\r\x1b[K%s", strings.TrimSpace(string(p)))
		t.shown = true
	}
	return len(p), nil
}

func (t *ticker) end() {
	if t.shown {
		fmt.Fprint(t.w, "\r\x1b[K")
	}
}
