package tun

import (
	"encoding/binary"
	"testing"
)

// The layout as struct virtio_net_hdr has it, spelled out against a codec that
// would agree only with itself.
func TestVnetHeaderLayout(t *testing.T) {
	want := []byte{1, 4}
	for _, v := range []uint16{54, 1440, 34, 16} {
		want = binary.NativeEndian.AppendUint16(want, v)
	}
	h := vnetHeader{flags: 1, gsoType: 4, hdrLen: 54, gsoSize: 1440, csumStart: 34, csumOffset: 16}
	var got [vnetHeaderLen]byte
	h.encode(&got)
	if string(got[:]) != string(want) {
		t.Errorf("encoded % x, want % x", got, want)
	}
}

func FuzzVnetHeader(f *testing.F) {
	f.Add([]byte("0123456789"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < vnetHeaderLen {
			return
		}
		in := [vnetHeaderLen]byte(b)
		h := decodeVnet(&in)
		var out [vnetHeaderLen]byte
		h.encode(&out)
		if in != out {
			t.Errorf("% x became % x", in, out)
		}
	})
}
