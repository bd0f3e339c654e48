package sniff

import (
	"encoding/binary"
	"errors"
	"testing"
)

// padded returns a ClientHello of the given size, without a name, in one record.
func padded(size int) []byte {
	body := make([]byte, 2+32, size) // legacy_version, random
	body = append(body, 0, 0, 2, 0x13, 1, 1, 0)
	extensions := size - recordHeader - handshakeHeader - len(body) - 2
	body = binary.BigEndian.AppendUint16(body, uint16(extensions))
	body = binary.BigEndian.AppendUint16(body, 21) // padding, RFC 7685
	body = binary.BigEndian.AppendUint16(body, uint16(extensions-4))
	body = append(body, make([]byte, extensions-4)...)
	p := append([]byte{recordHandshake, 3, 1}, binary.BigEndian.AppendUint16(nil, uint16(handshakeHeader+len(body)))...)
	p = append(p, typeClientHello, 0)
	p = binary.BigEndian.AppendUint16(p, uint16(len(body)))
	return append(p, body...)
}

// TestAHelloIsTooLongHoweverItComes checks that the outcome does not depend on how much of a hello
// is there at the first look.
func TestAHelloIsTooLongHoweverItComes(t *testing.T) {
	for size, want := range map[int]error{MaxFirst: nil, MaxFirst + 1: ErrTooLong} {
		p := padded(size)
		if len(p) != size {
			t.Fatalf("made %d bytes instead of %d", len(p), size)
		}
		for _, first := range []int{1, 5, 8, 9, 100, size - 1, size} {
			_, need, err := Stream(p[:first])
			for err == nil && need > 0 && need <= len(p) {
				_, need, err = Stream(p[:need])
			}
			if !errors.Is(err, want) || err == nil && need > 0 {
				t.Errorf("%d bytes, %d at first: %v, %d needed; want %v", size, first, err, need, want)
			}
		}
	}
}
