package foreign

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// Documents of Docker before 1.8.3 have fields without a value, which its later
// versions leave out before they make a config of one: the image's ID depends on it.
// They do so by reading the document into the types that they have, and writing these.
// The types here are those of Docker 20.10, with the order of its fields.

type oldDocument struct {
	ID              string        `json:"id,omitempty"`
	Parent          string        `json:"parent,omitempty"`
	Comment         string        `json:"comment,omitempty"`
	Created         time.Time     `json:"created"`
	Container       string        `json:"container,omitempty"`
	ContainerConfig oldContainer  `json:"container_config"`
	DockerVersion   string        `json:"docker_version,omitempty"`
	Author          string        `json:"author,omitempty"`
	Config          *oldContainer `json:"config,omitempty"`
	Architecture    string        `json:"architecture,omitempty"`
	Variant         string        `json:"variant,omitempty"`
	OS              string        `json:"os,omitempty"`
	Size            int64         `json:",omitempty"`
}

type oldContainer struct {
	Hostname        string
	Domainname      string
	User            string
	AttachStdin     bool
	AttachStdout    bool
	AttachStderr    bool
	ExposedPorts    map[string]struct{} `json:",omitempty"`
	Tty             bool
	OpenStdin       bool
	StdinOnce       bool
	Env             []string
	Cmd             words
	Healthcheck     json.RawMessage `json:",omitempty"` // younger than these documents
	ArgsEscaped     bool            `json:",omitempty"`
	Image           string
	Volumes         map[string]struct{}
	WorkingDir      string
	Entrypoint      words
	NetworkDisabled bool   `json:",omitempty"`
	MacAddress      string `json:",omitempty"`
	OnBuild         []string
	Labels          map[string]string
	StopSignal      string `json:",omitempty"`
	StopTimeout     *int   `json:",omitempty"`
	Shell           words  `json:",omitempty"`
}

// renewed is a document as Docker takes it over.
func renewed(raw json.RawMessage) (json.RawMessage, error) {
	var v struct {
		DockerVersion string `json:"docker_version"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, err
	}
	if !olderThan(v.DockerVersion, [3]int{1, 8, 3}) {
		return raw, nil
	}
	var d oldDocument
	if err := json.Unmarshal(raw, &d); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}

// olderThan compares versions by their numbers; what is none is 0.
func olderThan(version string, than [3]int) bool {
	parts := strings.Split(version, ".")
	for i := range max(len(parts), len(than)) {
		var a, b int
		if i < len(parts) {
			a, _ = strconv.Atoi(parts[i])
		}
		if i < len(than) {
			b = than[i]
		}
		if a != b {
			return a < b
		}
	}
	return false
}
