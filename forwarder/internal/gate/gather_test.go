package gate

import "testing"

func TestGatherTrimsToExactlyWhatIsGranted(t *testing.T) {
	for _, row := range []struct{ grant, pieces, last int }{{10, 1, 10}, {11, 2, 1}, {20, 2, 10}, {29, 3, 9}, {30, 3, 10}, {99, 3, 10}} {
		var g Gather
		for range 3 {
			_, _ = g.Write(make([]byte, 10))
		}
		g.Trim(row.grant)
		if g.N != row.pieces || int(g.Iov[g.N-1].Len) != row.last || g.Bytes != min(row.grant, 30) {
			t.Errorf("trimmed to %d: %d pieces, the last of %d, %d bytes", row.grant, g.N, g.Iov[g.N-1].Len, g.Bytes)
		}
	}
}
