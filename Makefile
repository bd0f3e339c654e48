# Sluice. `make help` lists the targets. `make run` shows it at work, `make test` tests all of it;
# both work as root and as an ordinary user.

GO      ?= $(or $(shell command -v go 2>/dev/null),/usr/local/go/bin/go)
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZ    ?= 20s

GOLANGCI    = github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0

# Where `make install` puts things: below PREFIX, in the file system that begins at DESTDIR.
PREFIX  ?= /usr/local
DESTDIR ?=

export GO
export CGO_ENABLED = 0
# The recipes' own tools, wherever `go test` starts them from.
export PATH := $(dir $(GO)):$(PATH):/usr/local/sbin:/usr/sbin:/sbin

KILLS   ?= 500

.PHONY: build help install man run demo-cni test clients bench soak-cni soak-memory bench-cni e2e-kube threat-model lint vuln fuzz clean

# The binaries, static, in build/.
build:
	@# sluice keeps its symbol table, which the sandbox's guest needs (guest/signals.go). The tag leaves
	@# out what cli prints documents with: its regular expressions take 3 ms of each process's start.
	stamp=$$($(GO) list ./cmd/internal/cmdline).version=$(VERSION) && \
	$(GO) build -trimpath -tags urfave_cli_no_docs -ldflags "-w -X $$stamp" -o build/sluice ./cmd/sluice && \
	$(GO) build -trimpath -tags urfave_cli_no_docs -ldflags "-s -w -X $$stamp" -o build/sluice-cni ./cmd/sluice-cni
	$(GO) build -trimpath -o build/peer ./e2e/peer

# This list, which is the comments above the targets.
help:
	@echo 'make [VARIABLE=value] TARGET, which is one of'
	@awk '/^# / { text = text "\n              " substr($$0, 3); next } \
		/^[a-z][a-z0-9-]*:/ && text { name = $$1; sub(/:.*/, "", name); printf "%-13s %s\n", name, substr(text, 16) } \
		{ text = "" }' $(firstword $(MAKEFILE_LIST))

# Manual pages, in build/man: one for each command, from its own help, and sluice-policy(5).
man: build
	rm -rf build/man
	mkdir -p build/man/source
	build/sluice reference build/man/source
	build/sluice-cni reference build/man/source
	$(GO) build -trimpath -o build/render-man ./hack/man
	title="-date=$$(git log -1 --format=%cs 2>/dev/null)" && \
	build/render-man "$$title" -source 'sluice $(VERSION)' build/man build/man/source/*.md && \
	build/render-man "$$title" -source 'sluice $(VERSION)' -page sluice-policy.5 \
		-summary 'files that say which flows a sandbox may start and accept' build/man docs/policy.md

# Binaries, manual pages and completions of bash, zsh and fish, below PREFIX (/usr/local).
# DESTDIR=DIR is put in front of it, for a package.
install: man
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin share/man/man1 share/man/man5 share/bash-completion/completions share/zsh/site-functions share/fish/vendor_completions.d)
	install -m 755 build/sluice build/sluice-cni $(DESTDIR)$(PREFIX)/bin
	install -m 644 build/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 build/man/*.5 $(DESTDIR)$(PREFIX)/share/man/man5
	for name in sluice sluice-cni; do \
		build/$$name completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$name && \
		build/$$name completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_$$name && \
		build/$$name completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/$$name.fish || exit 1; \
	done

# A sandboxed request that is answered, one that policy refuses, and the flow table.
run: build
	hack/run.sh

# Two containers of podman behind sluice-cni, one of which may reach the other. As root.
demo-cni: build
	hack/demo-cni.sh

# Everything: vet, unit tests, end-to-end tests as root and as an ordinary user.
# Installs what is missing as root, says what is missing otherwise.
test: build
	hack/test.sh

# As root: every client of the matrix "as without" (e2e/aswithout_test.go), those too that are too
# large for `make test`. Installs what they need; a client that cannot run is a failure.
# CLIENTS=REGEXP: only these.
clients: build
	hack/clients.sh $(if $(CLIENTS),'$(CLIENTS)')

# As root: a Kubernetes of two nodes, run as plain processes, with every pod behind Sluice. The
# first time it builds Kubernetes, into SLUICE_KUBE_DIR (~/.cache/sluice-e2e-kube): six minutes on
# two idle cores. Installs nothing; says what is missing (CONTRIBUTING.md).
e2e-kube: build
	SLUICE_E2E_KUBE=1 SLUICE_BIN=$(CURDIR)/build/sluice SLUICE_CNI_BIN=$(CURDIR)/build/sluice-cni \
		$(GO) test ./e2e/kube -count=1 -timeout 60m -v -run '^TestKubernetes$$'

# As root: writes what a hostile sandbox's attempts came to into docs/threat-model.md, which
# `make test` compares only.
threat-model: build
	hack/e2e-cni.sh 10m TestHostileSandbox THREAT_MODEL=$(CURDIR)/docs/threat-model.md SLUICE_WRITE_THREAT_MODEL=1

# Sluice against every peer on PATH (docs/performance.md). SHORT=1: two minutes;
# CELLS=REGEXP: only these.
bench: build
	$(GO) build -trimpath -o build/bench ./e2e/bench
	build/bench $(if $(SHORT),-short) $(if $(CELLS),-cells '$(CELLS)') $(if $(SHORT)$(CELLS),,-svg docs/bench.svg) $(BENCHFLAGS)

# As root: KILLS random `kill -9` of plugin, monitor and worker under load. SEED=N: the
# same ones again.
soak-cni: build
	hack/e2e-cni.sh 40m TestCNISoak SLUICE_SOAK_KILLS=$(KILLS) $(if $(SEED),SLUICE_SOAK_SEED=$(SEED))

# As root: 5 000 flows whose readers stand still (docs/performance.md).
soak-memory: build
	hack/e2e-cni.sh 10m TestReadersThatStandStill SLUICE_STILL_FLOWS=5000

# As root, on a machine that does nothing else: what the plugin costs a pod (docs/cni.md).
bench-cni: build
	hack/e2e-cni.sh 5m TestCNICosts SLUICE_BENCH_CNI=1

# gofmt, the linters of .golangci.yml (vet and staticcheck are among them) and shellcheck. Building
# them takes minutes the first time.
lint:
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(GO) run $(GOLANGCI) run ./...
	@if command -v shellcheck >/dev/null; then shellcheck hack/*.sh .ci/run; else echo 'lint: shellcheck is not installed' >&2; exit 1; fi

# Known vulnerabilities in what the binaries call, by vuln.go.dev. Fails too where it cannot be
# reached; VULNDB=URL names a copy.
vuln:
	@$(GO) run $(GOVULNCHECK) $(if $(VULNDB),-db '$(VULNDB)') ./... || { \
		echo 'vuln: failed. Unless vulnerabilities are listed above, nothing was checked: where vuln.go.dev cannot be reached, use a copy of it, make vuln VULNDB=file:///DIR (https://go.dev/security/vuln/database)' >&2; exit 1; }

# Every fuzz target for FUZZ each.
fuzz:
	hack/fuzz.sh $(FUZZ)

# Removes build/.
clean:
	rm -rf build
