// Package boundedjson decodes JSON from files that nobody vouches for: encoding/json
// bounds its nesting by what fits a stack, not by what a document needs.
package boundedjson
