# Every target is a command or two that can also be run by hand. `make help` lists them.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PREFIX   ?= /usr/local
OUT      ?= bin
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PKGS     ?= ./...
TIMEOUT  ?= 14m
DURATION ?= 30m
FUZZTIME ?= 20s

# -buildvcs=false: git refuses to look into a clone that belongs to another user, and the version comes from VERSION.
export GOFLAGS := -buildvcs=false $(GOFLAGS)

# A user without a writable home directory still gets a build and a module cache.
writable = $(shell d=$$(go env $(1) 2>/dev/null || true); echo "$$d" | grep -q ^/ && mkdir -p "$$d" 2>/dev/null && test -w "$$d" && echo yes)
ifneq ($(call writable,GOCACHE),yes)
export GOCACHE := /tmp/plyfs-gocache-$(shell id -u)
endif
ifneq ($(call writable,GOMODCACHE),yes)
export GOMODCACHE := /tmp/plyfs-gomodcache-$(shell id -u)
export GOPATH := /tmp/plyfs-gopath-$(shell id -u)
endif

# The time that manual pages and packages carry: that of the commit, so that two builds of it are equal.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

.PHONY: help build man demo test test-race snapshotter-suite lint fmt bench fuzz soak install uninstall deb clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PKGS TIMEOUT (test) V=1 (test: every result line) DURATION SEED (soak) FUZZTIME (fuzz) SAVE BENCHFLAGS (bench) OUT (where things are built) PREFIX DESTDIR SBINDIR ZSHDIR FUSE_OVERLAYFS=1 (install, uninstall)"

BUILD = -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

build: ## build the static binary bin/plyfs
	CGO_ENABLED=0 go build $(BUILD) -o $(OUT)/plyfs ./cmd/plyfs

man: ## write the manual pages of the commands and the shell completions to bin/share
	rm -rf $(OUT)/share
	CGO_ENABLED=0 GOOS= GOARCH= SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) go run $(BUILD) ./cmd/plyfs gen-docs $(OUT)/share

demo: ## make a real Debian image, mount it, work in it, commit it, save it (root; under 5 minutes)
	integration/demo/run

test: ## run all tests (under 15 minutes; what this machine does not allow is skipped and summed up)
	go run ./.ci/testsum $(if $(V),-v) -- -p 2 -timeout $(TIMEOUT) $(PKGS)

test-race: ## run all tests under the race detector (needs a C compiler)
	CGO_ENABLED=1 go run ./.ci/testsum $(if $(V),-v) -- -race -p 2 -timeout 45m $(PKGS)

# A module of its own: what containerd depends on is fetched for this alone.
snapshotter-suite: build ## run containerd's tests of snapshotters on bin/plyfs (root; fetches containerd from the Go module proxy; a minute)
	cd integration/containerdsuite; \
	timeout 300 go mod download || { echo "skipped: containerd's module cannot be fetched"; exit 0; }; \
	go vet . && PLYFS_BINARY='$(abspath $(OUT))/plyfs' go test -count 1 -timeout 10m . -args -test.root

lint: ## check format, vet, staticcheck, and that go.mod is tidy
	.ci/lint

fmt: ## format all Go files
	go tool gofumpt -l -w .

# Those of single packages: go test -run '^$' -bench . PACKAGE, and go tool benchstat OLD NEW.
bench: ## compare with kernel overlayfs and others on this machine (root, about an hour; SAVE=1 keeps the results in docs/; BENCHFLAGS='-quick', '-list', '-h')
	go run ./integration/bench $(if $(SAVE),-save) $(BENCHFLAGS)

fuzz: ## fuzz every fuzz target for FUZZTIME
	FUZZTIME=$(FUZZTIME) .ci/fuzz $(PKGS)

soak: ## compare with kernel overlayfs on random trees and operations for DURATION
	SOAK_DURATION=$(DURATION) go test -v -count 1 -timeout 0 -run 'TestSoak|TestManyMounts' ./integration $(if $(SEED),-oracle.seed $(SEED))

INSTALL = OUT='$(OUT)' DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SBINDIR='$(SBINDIR)' ZSHDIR='$(ZSHDIR)' FUSE_OVERLAYFS='$(FUSE_OVERLAYFS)' cmd/plyfs/dist/install

# Root often has no Go: then what was built before is installed.
install: $(if $(shell command -v go),build man) ## install below PREFIX: binary, mount helpers, manual, completions, units, examples (FUSE_OVERLAYFS=1: also as fuse-overlayfs)
	$(INSTALL) install

uninstall: ## remove what install has installed with the same variables
	$(INSTALL) uninstall

deb: build man ## make a Debian package, bin/plyfs_VERSION_ARCH.deb (fetches nfpm from the Go module proxy)
	OUT='$(OUT)' VERSION='$(VERSION)' SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) cmd/plyfs/dist/deb

clean: ## remove what the targets made, except the downloads in .cache
	rm -rf bin
