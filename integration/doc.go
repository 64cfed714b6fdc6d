// Package integration holds the tests that need real components: a real
// kernel, real mounts, real archives, several processes.
//
// # What is here
//
//	harness/            builds the binary, mounts (plyfs, kernel overlayfs,
//	                    fuse-overlayfs), unmounts, watches for hangs and leaks
//	oracle/             layer stacks, operations, the agent that executes them,
//	                    comparison, generator, reduction of a failing run
//	crash/              stories that a kill or a power cut interrupts; a disk that
//	                    records what is written to it
//	archive/            image archives, right and wrong ones
//	engine/             a place for container engines, and what belongs there
//	bench/              speed and memory, compared with other unions: make bench
//	testdata/cases/     named oracle cases, one small script per rule
//	testdata/script/    command-line tests (testscript)
//	oracle_*_test.go    random runs, named cases, the rename matrix; the same for
//	                    each io policy and transport
//	layers_test.go      layers on other file systems and on other unions
//	concurrency_test.go many processes in one directory, work beside a copy-up
//	signals_test.go     clients killed in the middle of an operation
//	dialect_test.go     .wh. and userxattr layers against the same stack in
//	                    the overlay dialect
//	crash_test.go       kill -9 of the mount server during writes, and at every step
//	powerloss_test.go   the power goes at many moments
//	memory_test.go      what the server takes for an inode, and gives back
//	script_test.go      the verbs of the command line
//	install_test.go     make install and uninstall, make deb, what they install
//	image_test.go       archives: load, mount, compare, save
//	registry_test.go    pull and push: Debian's docker-registry, skopeo at its other
//	                    side; restarts, kills, a daemon with the client's credentials
//	parallel_test.go    many processes at once, leaks
//	userns_test.go      the random runs inside a user namespace
//	user_test.go        a mount by an ordinary user, through fusermount3
//	shell_test.go       programs in images, as root and as users with and without
//	                    subordinate ids: what they see, whom they are
//	shell_hostile_test.go  images that try to reach the machine
//	shell_end_test.go   processes of a shell killed; its terminal
//	bundle_test.go      bundles, started by runc and crun
//	posix_test.go       go-fuse's posixtest on a mount
//	engines_*_test.go   podman, buildah and docker with plyfs as their
//	                    fuse-overlayfs, as root and as a user; the forms in which
//	                    scripts mount
//
// # Kernel overlayfs is the oracle
//
// An oracle run builds the same layers twice, mounts one copy with kernel
// overlayfs and the other with plyfs, executes the same operations on both and
// compares every result (errno and data), the trees at the end, and the trees
// after the written upper directories have been mounted by the other one. The
// few differences that are accepted are in oracle/accepted.go, each with its
// reason.
//
// # Knobs
//
//	PLYFS_SUBJECT=plyfs|fuse-overlayfs|kernel   what is compared with the kernel
//	PLYFS_BIN=FILE          use this binary and do not build one
//	PLYFS_RACE=1            build it with the race detector
//	PLYFS_ARTIFACTS=DIR     where failing runs are kept (testdata/failures)
//	PLYFS_TEST_DIR=DIR      where layers and uppers are built ($TMPDIR, and
//	                        /dev/shm in turn)
//	SOAK_DURATION=1h        length of TestSoak; without, it and TestSoakCases are skipped
//	-oracle.seed N          first seed of the random runs
//	-oracle.duration D      length of the random runs (default 30s)
//	-oracle.replay FILE     execute a saved run
//	-oracle.limit D         how long one operation may take (1m)
//	-powerloss.cuts N       how often the power goes
//	-crash.all              kill at every arrival at every step
//	-oracle.trace           log every operation with the kernel's result
//	-oracle.reduce          reduce a failing run before it is saved
//
// Every test that mounts puts a time limit on each operation, executes it in
// another process, and breaks the FUSE connection when the limit is reached,
// so that a hang is a failure with a stack trace and not a hanging test.
package integration
