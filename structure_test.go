package sluice

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The figures of the repository's shape, tests aside. What exceeds one does more than one
// thing, or is in one of the tables of exceptions with the reason.
const (
	maxPackageLines = 3500
	maxFields       = 15
	maxMethods      = 25
	// The forwarder itself only wires the packages below it.
	maxForwarderLines = 900
)

// mayHaveLines are the packages of more than maxPackageLines lines.
var mayHaveLines = map[string]string{
	"policy": "one language: parsing, compiling, deciding and explaining share every type, and its file map is in doc.go",
}

const (
	settings = "settings: one field for each thing that may be set"
	counted  = "counters: one field for each thing that is counted"
	record   = "a record of a public format: one field for each of its words"
)

// mayHaveFields are the structs of more than maxFields fields.
var mayHaveFields = map[string]string{
	"cni.Attachment":                             record,
	"cni.Config":                                 settings,
	"cni.LaunchSpec":                             settings,
	"cni/uplink.RouteState":                      "what was changed in the kernel, each thing to be undone",
	"forwarder.Config":                           settings,
	"forwarder/dns.Resolver":                     "the caches and bounds of one resolver",
	"forwarder/dns.Stats":                        counted,
	"forwarder/dns.counters":                     counted,
	"forwarder/internal/datagram.Flow":           "what a packet's path reads of a flow, in one cache line after the other",
	"forwarder/internal/datagram.hostSocket":     "what a batch's path reads of a socket, and the two locks around it",
	"forwarder/internal/inbound.Path":            "the two directions of the packet path, and what both share",
	"forwarder/internal/inbound.outsideCounters": counted,
	"forwarder/internal/tcpflow.Forwarder":       counted,
	"nat.Flow":                                   record,
	"nat.Lease":                                  "what the accounting path reads of a flow",
	"nat.Stats":                                  counted,
	"nat.Table":                                  counted,
	"sandbox.AttachmentConfig":                   settings,
	"sandbox.Config":                             settings,
	"sandbox/api.FlowRecord":                     record,
	"sandbox/api.Info":                           record,
	"sandbox/guest.Config":                       settings,
	"sandbox/guest.Guest":                        "what the stage inside holds for its sandbox, each thing with its end",
	"sandbox/internal/channel.WorkerConfig":      settings,
	"sandbox/internal/flowlog.FlowSink":          "the writer of one log and its counters",
	"sandbox/internal/fork.laid":                 "what a forked child needs, laid out before there is no Go any more",
	"sandbox/internal/worker.Worker":             "the parts that a worker wires together",
}

// mayHaveMethods are the types of more than maxMethods methods.
var mayHaveMethods = map[string]string{
	"forwarder/dns.Resolver":               "one question's way through the cache, the gate and the upstreams",
	"forwarder/internal/inbound.Path":      "stack.NetworkDispatcher, and a packet's way in each direction",
	"forwarder/internal/tcpflow.Flow":      "the phases of one connection, its two pumps, and what admission asks of a flow; what is judged in it is check's",
	"forwarder/internal/tcpflow.Forwarder": "a segment's way to its flow",
	"nat.Table":                            "the table's whole public interface",
	"policy.parser":                        "one for each construct of the language",
	"sandbox/guest.Guest":                  "the guest's whole public interface",
	"sandbox/internal/worker.Worker":       "one for each message of the channel, and each question on a control connection",
	"tun.Endpoint":                         "stack.LinkEndpoint, and what the forwarder asks of a device beside it",
}

// shape is what was counted of one package.
type shape struct {
	lines   int
	fields  map[string]int
	methods map[string]int
}

func TestPackagesAreSmall(t *testing.T) {
	shapes := make(map[string]*shape)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		if shapes[dir] == nil {
			shapes[dir] = &shape{fields: make(map[string]int), methods: make(map[string]int)}
		}
		shapes[dir].lines += bytes.Count(text, []byte("\n"))
		file, err := parser.ParseFile(token.NewFileSet(), path, text, 0)
		if err != nil {
			return err
		}
		shapes[dir].count(file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(shapes) < 20 {
		t.Fatalf("only %d packages were looked at", len(shapes))
	}
	tooMany := func(what, dir string, counts map[string]int, most int, excused map[string]string, used map[string]bool) {
		for _, name := range slices.Sorted(maps.Keys(counts)) {
			key := dir + "." + name
			if counts[name] <= most {
				continue
			}
			used[key] = true
			if excused[key] == "" {
				t.Errorf("%s has %d %s, more than %d", key, counts[name], what, most)
			}
		}
	}
	usedFields, usedMethods := make(map[string]bool), make(map[string]bool)
	for _, dir := range slices.Sorted(maps.Keys(shapes)) {
		s := shapes[dir]
		switch reason := mayHaveLines[dir]; {
		case s.lines > maxPackageLines && reason == "":
			t.Errorf("package %s has %d lines, more than %d", dir, s.lines, maxPackageLines)
		case s.lines <= maxPackageLines && reason != "":
			t.Errorf("package %s needs no exception for its lines any more", dir)
		}
		tooMany("fields", dir, s.fields, maxFields, mayHaveFields, usedFields)
		tooMany("methods", dir, s.methods, maxMethods, mayHaveMethods, usedMethods)
	}
	if n := shapes["forwarder"].lines; n > maxForwarderLines {
		t.Errorf("package forwarder has %d lines, more than %d: it only wires others", n, maxForwarderLines)
	}
	for key := range mayHaveFields {
		if !usedFields[key] {
			t.Errorf("%s needs no exception for its fields any more", key)
		}
	}
	for key := range mayHaveMethods {
		if !usedMethods[key] {
			t.Errorf("%s needs no exception for its methods any more", key)
		}
	}
}

// count adds what a file declares.
func (s *shape) count(file *ast.File) {
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv != nil {
				s.methods[receiver(d.Recv.List[0].Type)]++
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				typ, ok := spec.(*ast.TypeSpec)
				if !ok {
					continue
				}
				if st, ok := typ.Type.(*ast.StructType); ok {
					for _, f := range st.Fields.List {
						s.fields[typ.Name.Name] += max(1, len(f.Names))
					}
				}
			}
		}
	}
}

// receiver returns the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}
