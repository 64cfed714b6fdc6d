package main

import "testing"

func TestByteSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "100": 100, "64k": 64 << 10, "64m": 64 << 20, "64MiB": 64 << 20, "2g": 2 << 30, "2GB": 2 << 30, "7b": 7,
		"": -1, "m": -1, "-1m": -1, "1.5g": -1, "64mm": -1, "1t": -1, "9999999999g": -1, "9223372036854775807": -1,
	} {
		var b byteSize
		err := b.Set(text)
		if (err != nil) != (want < 0) || err == nil && int64(b) != want {
			t.Errorf("%q is %d, %v; expected %d", text, b, err, want)
		}
	}
}
