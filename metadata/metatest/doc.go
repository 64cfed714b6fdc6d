// Package metatest damages databases: it writes what package metadata never would.
// For tests only.
package metatest
