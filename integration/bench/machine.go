package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine describes where results come from.
type machine struct {
	Kernel     string
	Arch       string
	CPU        string
	CPUs       int
	Memory     float64 // bytes
	OS         string
	Go         string
	Hypervisor bool
	LoadBefore string // load average over 1, 5 and 15 minutes
	LoadAfter  string
}

func describeMachine() machine {
	m := machine{Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Go: runtime.Version(), LoadBefore: loadAverage()}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	cpu := fields("/proc/cpuinfo", ":")
	m.CPU = cpu["model name"]
	m.Hypervisor = strings.Contains(" "+cpu["flags"]+" ", " hypervisor ")
	if kb, err := strconv.ParseFloat(strings.TrimSuffix(fields("/proc/meminfo", ":")["MemTotal"], " kB"), 64); err == nil {
		m.Memory = kb * 1024
	}
	m.OS = strings.Trim(fields("/etc/os-release", "=")["PRETTY_NAME"], `"`)
	return m
}

// fields reads a file with a key and a value on each line; the first line of a
// key counts.
func fields(file, sep string) map[string]string {
	out := map[string]string{}
	b, err := os.ReadFile(file)
	if err != nil {
		return out // a description lacks a line then
	}
	for line := range strings.Lines(string(b)) {
		key, value, ok := strings.Cut(line, sep)
		if key = strings.TrimSpace(key); ok && out[key] == "" {
			out[key] = strings.TrimSpace(value)
		}
	}
	return out
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

func (m machine) text() string {
	virtual := ""
	if m.Hypervisor {
		virtual = ", virtual"
	}
	return fmt.Sprintf("Linux %s %s, %s, %d CPUs (%s%s), %s memory, %s; load average %s before, %s after",
		m.Kernel, m.Arch, m.OS, m.CPUs, m.CPU, virtual, memory.value(m.Memory), m.Go, m.LoadBefore, m.LoadAfter)
}
