package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const eventFormat = `name: fuse_request_send
print fmt: "connection %u req %llu opcode %u (%s) len %u ", REC->connection, REC->unique, REC->opcode, __print_symbolic(REC->opcode, {1, "FUSE_LOOKUP"}, {2, "FUSE_FORGET"}, {14, "FUSE_OPEN"}, { 44, "FUSE_READDIRPLUS" }, {4096, "CUSE_INIT"}), REC->len
`

func TestOpcodeNames(t *testing.T) {
	want := map[uint64]string{1: "LOOKUP", 2: "FORGET", 14: "OPEN", 44: "READDIRPLUS", 4096: "CUSE_INIT"}
	if diff := cmp.Diff(want, opcodeNames(eventFormat)); diff != "" {
		t.Error(diff)
	}
}

func TestParseHist(t *testing.T) {
	const text = `# event histogram
#
# trigger info: hist:keys=opcode:vals=hitcount:sort=hitcount:size=2048 if connection==51 [active]
#

{ opcode:         53 } hitcount:          1
{ opcode:         14 } hitcount:         17
{ opcode:          1 } hitcount:       7769

Totals:
    Hits: 7787
    Entries: 3
    Dropped: 0
`
	got, err := parseHist(text, opcodeNames(eventFormat))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(requests{"opcode 53": 1, "OPEN": 17, "LOOKUP": 7769}, got); diff != "" {
		t.Error(diff)
	}
	if got.total() != 7787 {
		t.Errorf("total is %d", got.total())
	}
	got, err = parseHist(strings.Replace(text, "Dropped: 0", "Dropped: 4", 1), nil)
	if err != nil || got[lostRequests] != 4 || got.total() != 7787 {
		t.Errorf("with dropped ones: %v, %v", got, err)
	}
}

func TestParseTrace(t *testing.T) {
	const text = `# tracer: nop
#
# entries-in-buffer/entries-written: 3/3   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
           bench-4711    [001] ..... 12075.104: fuse_request_send: connection 51 req 62 opcode 1 (FUSE_LOOKUP) len 48 
           bench-4711    [000] ..... 12075.105: fuse_request_send: connection 51 req 64 opcode 14 (FUSE_OPEN) len 48 
           bench-4711    [001] ..... 12075.106: fuse_request_send: connection 51 req 66 opcode 1 (FUSE_LOOKUP) len 48 
`
	got, err := parseTrace(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(requests{"LOOKUP": 2, "OPEN": 1}, got); diff != "" {
		t.Error(diff)
	}
}
