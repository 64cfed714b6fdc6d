// Package archive writes image archives for tests, right ones and wrong ones,
// without any other tool.
package archive
