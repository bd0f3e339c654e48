# Sluice. `make run` shows it at work, `make test` tests all of it; both work as root and
# as an ordinary user.

GO      ?= $(or $(shell command -v go 2>/dev/null),/usr/local/go/bin/go)
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZ    ?= 20s

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

export GO
export CGO_ENABLED = 0
# The recipes' own tools, wherever `go test` starts them from.
export PATH := $(dir $(GO)):$(PATH):/usr/local/sbin:/usr/sbin:/sbin

KILLS   ?= 500

.PHONY: build run demo-cni test clients bench soak-cni soak-memory bench-cni e2e-kube lint fuzz clean

# One static binary for people, which needs its symbol table (forwarder/sandbox/guest/signals.go),
# and one that is a CNI plugin.
build:
	$(GO) build -trimpath -ldflags '-w -X main.version=$(VERSION)' -o build/sluice ./cmd/sluice
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o build/sluice-cni ./cmd/sluice-cni
	$(GO) build -trimpath -o build/peer ./e2e/peer

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

# A Kubernetes of two nodes with every pod behind Sluice, in one to three minutes. KUBE_TOOLS
# is the directory of the programs that start one; unset, what it must hold is said.
e2e-kube: build
	hack/kube.sh

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

lint:
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	@if command -v shellcheck >/dev/null; then shellcheck hack/*.sh .ci/run; else echo 'lint: shellcheck is not installed' >&2; exit 1; fi

# Every fuzz target for FUZZ each.
fuzz:
	hack/fuzz.sh $(FUZZ)

clean:
	rm -rf build
