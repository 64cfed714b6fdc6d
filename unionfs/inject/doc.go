// Package inject makes requests of a live mount fail, wait, or move less data than they
// were asked for: to find out what a program does then.
//
// # What always holds
//
//   - While there are no rules a request costs one load of an atomic variable.
//   - A fault takes the place of the request or comes before it: a request that is answered
//     with an error has not been carried out, not even in part.
//   - Every rule ends by itself, at the latest after [Longest]. A server that takes over from
//     one that has died has no rules.
//   - No rule can keep a mount from being unmounted, nor files from being closed: FORGET,
//     RELEASE and the like meet no faults. A request that waits for a latency has the mount
//     busy, and its program cannot be killed; it waits no longer when the rule ends or is cleared.
//   - ENOSYS is never injected: the kernel would never ask again.
//
// # Data
//
// What the kernel reads and writes by itself meets no fault. So a file that a rule about data
// names is opened in a way that brings every read and write here, from the rule's first moment
// on ([Faults.Direct]); what was open before stays as it is.
package inject
