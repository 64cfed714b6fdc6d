package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/plyfs/plyfs/layers"
	"github.com/plyfs/plyfs/mountd"
)

func newLoadCommand(a *app) *cobra.Command {
	var input string
	var r mountd.LoadRequest
	var quiet bool
	cmd := &cobra.Command{
		Use:   "load [-i FILE|DIR]",
		Short: "Load images from a docker or OCI archive, or an OCI layout",
		Long: `Load every image of an archive: docker save of any version, OCI archive, or the
directory of an OCI layout or of skopeo (dir:); plain, gzip, zstd, xz or bzip2. Digests are verified on the way, and
layers that the store has already are not stored again.`,
		Example: `  plyfs load -i debian.tar
  skopeo copy docker://debian oci-archive:/dev/stdout | plyfs load
  plyfs load -i ./oci-layout`,
		Args: exactArgs(0, "no arguments (the archive goes to -i or standard input)"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, done, err := openSource(cmd.Context(), input)
			if err != nil {
				return err
			}
			defer done()
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				p := newProgress(quiet)
				loaded, err := s.Load(ctx, r, src, p.callback())
				p.finish()
				if err != nil {
					return err
				}
				if a.json {
					return printJSON(list(loaded))
				}
				for _, i := range loaded {
					for _, ref := range i.Refs {
						if old, ok := i.Replaced[ref]; ok {
							fmt.Printf("The image %s already exists, renaming the old one with ID %s to empty string\n", printable(ref), old)
						}
						fmt.Println("Loaded image: " + printable(ref))
					}
					if len(i.Refs) == 0 {
						fmt.Println("Loaded image ID: " + i.ID.String())
					}
				}
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&input, "input", "i", "", "archive or layout directory (default: standard input)")
	f.StringVar(&r.Platform, "platform", "", "os/arch[/variant] to take from an index (default: this machine)")
	f.StringVar(&r.Ref, "ref", "", "name for an image that carries none")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress bars")
	return cmd
}

func newProgress(quiet bool) *progress {
	if quiet {
		return &progress{}
	}
	return startProgress()
}

// openSource opens what a command reads: a file, a directory, or standard
// input for "" and "-".
func openSource(ctx context.Context, name string) (layers.Source, func(), error) {
	if name == "" || name == "-" {
		if isTerminal(os.Stdin) {
			return layers.Source{}, nil, usagef("no archive: give one with -i FILE, or on standard input")
		}
		return layers.Source{Reader: interruptible(ctx, os.Stdin), Size: regularSize(os.Stdin)}, func() {}, nil
	}
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return layers.Source{}, nil, notFound{fmt.Errorf("archive %q does not exist", name)}
	}
	if err != nil {
		return layers.Source{}, nil, err
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		_ = f.Close() // opened again by name below
		dir, err := filepath.Abs(name)
		return layers.Source{Dir: dir}, func() {}, err
	}
	return layers.Source{Reader: interruptible(ctx, f), Size: regularSize(f)}, func() { _ = f.Close() }, nil // read only
}

// interruptible lets Ctrl-C end a read from a pipe in which nothing comes. The
// read itself goes on until the process ends.
func interruptible(ctx context.Context, f *os.File) io.Reader {
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		return f
	}
	pr, pw := io.Pipe()
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{pw}, struct{ io.Reader }{f}, make([]byte, 256<<10))
		pw.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { pr.CloseWithError(ctx.Err()) })
	return pr
}

type notFound struct{ error }

func (e notFound) Unwrap() []error { return []error{layers.ErrNotFound, e.error} }

func regularSize(f *os.File) int64 {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return 0
	}
	return st.Size()
}

func newImportCommand(a *app) *cobra.Command {
	var r mountd.ImportRequest
	var quiet bool
	cmd := &cobra.Command{
		Use:   "import TAR [REF]",
		Short: "Make an image of a root filesystem tar",
		Example: `  plyfs import rootfs.tar.zst localhost/base:1
  tar -C rootfs -c . | plyfs import - localhost/base:2 -c 'CMD ["/bin/sh"]'`,
		Args:              rangeArgs(1, 2, "TAR (or -) and an optional REF"),
		ValidArgsFunction: completeArgs(completeFiles),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, done, err := openSource(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer done()
			if src.Dir != "" {
				return usagef("%q is a directory: import takes a tar (tar -C %s -c . | plyfs import -)", args[0], args[0])
			}
			if len(args) > 1 {
				r.Ref = args[1]
			}
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				p := newProgress(quiet)
				img, err := s.Import(ctx, r, src, p.callback())
				p.finish()
				if err != nil {
					return err
				}
				return a.printImage(img)
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&r.Message, "message", "m", "", "comment for the history")
	f.StringArrayVarP(&r.Changes, "change", "c", nil, "Dockerfile instruction to apply to the configuration, as docker does; may be repeated")
	f.StringVar(&r.Platform, "platform", "", "os/arch[/variant] of the image (default: this machine)")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress bars")
	return cmd
}

// printImage prints the ID of an image that was made.
func (a *app) printImage(img layers.Image) error {
	if a.json {
		return printJSON(img)
	}
	fmt.Println(img.ID.String())
	return nil
}

// formatLayout is an OCI layout as a directory, which only the client makes.
const formatLayout = "oci-dir"

func newSaveCommand(a *app) *cobra.Command {
	var output string
	var r mountd.SaveRequest
	var quiet bool
	cmd := &cobra.Command{
		Use:   "save -o FILE IMAGE…",
		Short: "Write images as an archive that docker, podman and skopeo can load",
		Long: `Write images as an archive. A name without a tag stands for all images of that
repository; an image that is given by its ID has no name in the archive. Images that were
made from others of the archive are known to be so where docker or plyfs load it.`,
		Example: `  plyfs save -o debian.tar debian:12
  plyfs save debian:12 | podman load
  plyfs save --format oci-dir -o layout debian:12`,
		Args:              rangeArgs(1, -1, "one IMAGE or more"),
		ValidArgsFunction: completeEach(a.images()),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Refs = args
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				p := newProgress(quiet)
				write := writeOutput
				if r.Format == formatLayout {
					write, r.Format = writeLayout, layers.FormatOCI
				}
				err := write(output, func(w io.Writer) error { return s.Save(ctx, r, w, p.callback()) })
				p.finish()
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&output, "output", "o", "", "file to write, for oci-dir a directory (default: standard output)")
	f.StringVar(&r.Format, "format", "", "docker (default; also a valid OCI layout), docker-old (as Docker 1.10 to 24), oci, or oci-dir (a layout in a new directory)")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress bars")
	return cmd
}

func newExportCommand(a *app) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:               "export -o FILE NAME|IMAGE",
		Short:             "Write the whole tree of a container or image as one tar",
		Example:           "  plyfs export -o rootfs.tar mycontainer",
		Args:              exactArgs(1, "one NAME or IMAGE"),
		ValidArgsFunction: completeArgs(a.imagesAndContainers()),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(cmd, func(ctx context.Context, s mountd.Service) error {
				return writeOutput(output, func(w io.Writer) error {
					p := startProgress()
					defer p.finish()
					return s.Export(ctx, mountd.NameRequest{Name: args[0]}, p.counting(args[0], "exporting", w))
				})
			})
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

// counting shows how much has been written to w.
func (p *progress) counting(id, action string, w io.Writer) io.Writer {
	if p.p == nil {
		return w
	}
	return &countingWriter{w: w, p: p, u: layers.Progress{ID: id, Action: action}}
}

type countingWriter struct {
	w io.Writer
	p *progress
	u layers.Progress
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.u.Current += int64(n)
	c.p.update(c.u)
	return n, err
}

// writeOutput gives f a writer for the file of a name, or standard output for
// "" and "-". A file appears under its name when it is complete; what is there
// already stays until then.
func writeOutput(name string, f func(io.Writer) error) (err error) {
	if name == "" || name == "-" {
		if isTerminal(os.Stdout) {
			return usagef("refusing to write an archive to a terminal: use -o FILE, or redirect")
		}
		return f(os.Stdout)
	}
	if st, serr := os.Stat(name); serr == nil && !st.Mode().IsRegular() {
		if st.IsDir() {
			return usagef("%q is a directory: -o takes a file", name)
		}
		out, err := os.OpenFile(name, os.O_WRONLY, 0) // a pipe or device
		if err != nil {
			return err
		}
		return errors.Join(f(out), out.Close())
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), ".plyfs-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = tmp.Close() // already failed
			_ = os.Remove(tmp.Name())
		}
	}()
	if err := f(tmp); err != nil {
		return err
	}
	mode := fs.FileMode(0o666) &^ umask()
	if err := errors.Join(tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %q: %w", name, err)
	}
	return os.Rename(tmp.Name(), name)
}
