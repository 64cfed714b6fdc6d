// Package layers is the layer and image store: image archives in, directories
// to mount out, and back again byte for byte.
package layers
