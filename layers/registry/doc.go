// Package registry is the client side of registries: where an image is found, with
// which right, and how its manifests and blobs are moved. It knows no store; what
// is done with the bytes, and whether they are what a digest promised, is the
// business of package layers.
//
// # Two steps, maybe in two processes
//
// [Discover] reads what the user has configured: registries.conf, certs.d, the
// files and helpers that docker login and podman login leave credentials in, and
// the proxy variables. The result, an [Access], is a plain value: the endpoints of
// one repository with all that is needed to reach them. [Open] takes it, and reads
// no file and no variable.
//
// So a command that talks to a daemon does the first step itself and sends the
// Access over the socket; the daemon does the second. It sees the credentials of
// one repository for the time of one call, keeps none, and opens no file that a
// client names. The transfer is the daemon's because the store is: partial
// downloads survive the client, and the bytes do not cross the socket.
//
// # Names
//
// A name without a host is one of docker.io, as for docker: "debian" is
// docker.io/library/debian everywhere. The search list and the short names of
// podman (unqualified-search-registries, [aliases]) are not used, because with
// them the same name means different images on different machines, and that of
// the first registry that claims to have it.
//
// # What is believed
//
// Nothing that a digest can prove. A tag is what the registry says it is. An
// answer that contradicts what was asked is [ErrCorrupt]; whatever is read has a
// limit in size, and a pace below which the connection is given up:
//
//	manifest          Options.ManifestBytes
//	blob              the size its descriptor gives, not one byte more
//	headers, errors   256 KiB, 8 KiB
//	redirects         10, never from https to http
//
// Signatures are not checked: nothing here knows who should have signed what.
//
// # Who sees credentials
//
// Only the host of the endpoint they were found for, and the token server that it
// names (over https if the endpoint was asked over https; never one with an address
// of this machine or a link-local one, unless it is the endpoint's own host). A
// redirect elsewhere, as to the servers that hold the blobs, gets no credentials
// and no client certificate, and a certificate that is not trusted is accepted of
// nobody but an endpoint configured as insecure. An upload is not redirected to
// another host at all.
//
// # Retries
//
// A request that got no answer, 408, 429 or 5xx is sent again, three times. A blob
// goes on where its connection broke (Range), for as long as each attempt brings
// something; where nothing comes for about half a minute, the next endpoint is
// tried, and then it is given up. An upload goes on where the registry says that it
// has lost it, or begins anew.
package registry
