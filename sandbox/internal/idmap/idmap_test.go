package idmap

import (
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
)

func TestParseSubIDs(t *testing.T) {
	for _, row := range []struct {
		name, text string
		want       []idExtent
	}{
		{"by name", "alice:100000:65536\n", []idExtent{{0, 100000, 65536}}},
		{"by uid", "1000:100000:65536", []idExtent{{0, 100000, 65536}}},
		{"two ranges", "alice:100000:10\nbob:5:5\n1000:200000:20\n", []idExtent{{0, 100000, 10}, {0, 200000, 20}}},
		{"somebody else's", "bob:100000:65536\n", nil},
		{"not numbers", "alice:x:65536\nalice:100000:-1\nalice:1\n", nil},
		{"empty or past the last id", "alice:100000:0\nalice:4294967290:10\n", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := parseSubIDs([]byte(row.text), "alice", 1000); !reflect.DeepEqual(got, row.want) {
				t.Errorf("got %v, want %v", got, row.want)
			}
		})
	}
	if got := parseSubIDs([]byte(":100000:65536\n"), "", 1000); got != nil {
		t.Errorf("a user without a name got %v", got)
	}
}

// surroundSlowly assigns the ids one by one.
func surroundSlowly(inside, caller uint32, ranges []idExtent) map[uint32]uint32 {
	out := map[uint32]uint32{inside: caller}
	next := uint32(0)
	for _, r := range ranges {
		for i := range r.Count {
			if next == inside {
				next++
			}
			out[next] = r.Outside + i
			next++
		}
	}
	return out
}

func TestSurroundIsTheOneByOneMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		inside, caller := uint32(rng.IntN(40)), uint32(1000)
		if rng.IntN(3) == 0 {
			inside = 0
		}
		var ranges []idExtent
		for i := range rng.IntN(4) {
			ranges = append(ranges, idExtent{0, uint32(100000 * (i + 1)), uint32(1 + rng.IntN(30))})
		}
		got := map[uint32]uint32{}
		for _, e := range surround(inside, caller, ranges) {
			for i := range e.Count {
				if _, twice := got[e.Inside+i]; twice {
					t.Fatalf("%d is mapped twice: inside %d, ranges %v", e.Inside+i, inside, ranges)
				}
				got[e.Inside+i] = e.Outside + i
			}
		}
		if want := surroundSlowly(inside, caller, ranges); !reflect.DeepEqual(got, want) {
			t.Fatalf("inside %d, ranges %v: got %v, want %v", inside, ranges, got, want)
		}
	}
}

func TestSurroundIsBounded(t *testing.T) {
	ranges := make([]idExtent, 10*maxExtents)
	for i := range ranges {
		ranges[i] = idExtent{0, uint32(100000 + 2*i), 1}
	}
	if n := len(surround(1000, 1000, ranges)); n != maxExtents {
		t.Errorf("%d extents", n)
	}
	full := []idExtent{{0, 0, math.MaxUint32}, {0, 0, math.MaxUint32}}
	var sum uint64
	for _, e := range surround(7, 1000, full) {
		sum += uint64(e.Count)
	}
	if sum > math.MaxUint32 {
		t.Errorf("%d ids", sum)
	}
}

func TestPingGroups(t *testing.T) {
	for _, row := range []struct {
		name string
		m    idMaps
		want string
	}{
		{"root's full map", idMaps{gid: []idExtent{{0, 0, math.MaxUint32}}}, "0 2147483647"},
		{"one id kept", *(&idMaps{insideID: ids{1000, 1000}}).mapOne(1000, 1000), "1000 1000"},
		{"one id as root", *(&idMaps{}).mapOne(1000, 1000), "0 0"},
	} {
		if got := row.m.PingGroups(); got != row.want {
			t.Errorf("%s: got %q, want %q", row.name, got, row.want)
		}
	}
}
