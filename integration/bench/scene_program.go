package main

// script runs a program in the mount; "$DIR" stands for that in all words.
func script(argv func(f *fixture) []string, env ...string) func(*fixture, *sizes) job {
	return func(f *fixture, _ *sizes) job {
		return job{Op: "exec", Argv: argv(f), Env: env}
	}
}

// gitStatus trusts size and time of modification: the other attributes of a
// file differ between systems for good reasons, and decide whether git reads all
// files anew.
var gitStatus = []string{
	"git", "-C", "$DIR/tree", "-c", "safe.directory=*", "-c", "core.checkStat=minimal", "-c", "core.trustctime=false",
	"-c", "core.fsmonitor=false", "status", "--porcelain",
}

func programsTable() table {
	status := script(func(*fixture) []string { return gitStatus }, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
	build := script(func(*fixture) []string {
		return []string{"go", "build", "-C", "$DIR/src", "-o", "$DIR/program", "."}
	}, append([]string{"GOCACHE=$DIR/cache"}, goEnv...)...)
	return table{"programs", "Programs", []scene{
		{name: "tar", fixture: "source", writes: true, steps: []step{
			{job: func(*fixture, *sizes) job { return job{Op: "mkdir", Names: []string{"unpacked"}} }},
			{phases: []phase{{Name: "tar", Title: "tar x of this source tree", Unit: duration}}, job: script(func(f *fixture) []string {
				return []string{"tar", "-C", "$DIR/unpacked", "-xf", f.args[0]}
			})},
		}},
		{name: "git", fixture: "source", writes: true, warm: true, steps: []step{
			{phases: []phase{{Name: "git-status-first", Title: "git status, fresh mount", Unit: duration}}, job: status},
			{phases: []phase{{Name: "git-status-again", Title: "git status again", Unit: duration}}, job: status},
		}},
		{name: "go", fixture: "build", writes: true, warmContent: true, steps: []step{
			{phases: []phase{{Name: "go-build", Title: "go build, 30 packages", Unit: duration}}, job: build},
		}},
		{name: "dpkg", fixture: "deb", writes: true, warm: true, steps: []step{
			{phases: []phase{{Name: "dpkg", Title: "dpkg -i", Unit: duration}}, job: script(func(f *fixture) []string {
				return []string{"dpkg", "--root=$DIR", "--log=/dev/null", "-i", f.args[0]}
			}, "PATH=/usr/sbin:/usr/bin:/sbin:/bin")},
		}},
	}}
}
