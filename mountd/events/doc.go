// Package events is the log of what happens to a store: images, containers, mounts, and
// the store itself. Every process that changes something writes it there, with or without
// a daemon, and whoever wants to know reads it there.
//
//	ROOT/events/log      the newest events, one JSON object a line
//	ROOT/events/log.1    those before; older ones are gone
//
// The log lies in the store and not in the run directory: it is about what is in the
// store, and what happened before a reboot is news after it.
//
// # What a reader can rely on
//
//   - Events have numbers without gaps. A reader that was too slow, and finds that the log
//     went on without it, gets an event of type [Log] that says how many it has missed; so
//     does one that finds lines that cannot be read. What it gets otherwise is complete.
//   - An event is written after the change that it tells of. A process that is killed
//     between the two, a full disk (the process logs a warning) or a power loss leave a
//     change without an event, and no gap: events are news, what is so says the service.
//   - A reader takes no lock, so that none can be in the way of a writer.
//   - What is read is bounded, whoever has written it: a line has at most [MaxLine] bytes,
//     and longer ones count as missed.
//
// # Writing
//
// Writers take turns by flock(2) on the file, for one read of its last line, which has the
// last number, and one write. The lock of a process that was stopped in the middle is not
// waited for longer than [lockWait]: O_APPEND keeps the line whole, and all that can
// happen is that two events have the same number. A file of [MaxFile] bytes is renamed,
// under the lock, so that nobody writes to it afterwards.
//
// # Crash
//
//	killed while         leaves                       then
//	-------------------  ---------------------------  ------------------------------------
//	a line is written    the line, or a part of it    the next writer begins a line of its
//	                     on a full disk               own; readers count the part as missed
//	the log is rotated   log.1 and no log             the next writer makes one, and goes on
//	                                                  with the number of log.1
package events
