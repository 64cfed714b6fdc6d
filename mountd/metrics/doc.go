// Package metrics writes numbers in the text format of Prometheus, version 0.0.4.
//
// The format is a few lines of text. The library that writes it brings a runtime for
// protocol buffers with it, which would be linked into, and initialised by, both processes
// of every mount: so it is only used by the tests, to read what is written here.
//
// # What always holds
//
//   - A family is written once, with its help and type, and all its samples follow.
//   - Label values are valid UTF-8 and escaped, whatever bytes they had.
//   - An error of the writer is kept; what is written after it is lost.
package metrics
