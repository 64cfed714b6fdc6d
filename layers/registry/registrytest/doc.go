// Package registrytest is a registry in the memory of a test. It does what a
// registry should, keeps a log of what it was asked, and breaks each rule on demand:
// see [Server.Fault].
package registrytest
