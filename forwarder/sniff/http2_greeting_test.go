package sniff

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/net/http2"
)

// FuzzGreeting checks that the answers match the client's frames: one acknowledgement for each
// SETTINGS and one answer for each PING, in order, however the frames are cut.
func FuzzGreeting(f *testing.F) {
	settings, ping := frame(frameSettings, 0, 0, []byte{0, 3, 0, 0, 0, 100}), frame(framePing, 0, 0, []byte("12345678"))
	for _, seed := range [][]byte{
		bytes.Join([][]byte{settings, ping, ping}, nil),
		bytes.Join([][]byte{settings, settings, frame(framePing, flagAck, 0, []byte("12345678")), frame(frameSettings, flagAck, 0, nil), ping}, nil),
		bytes.Join([][]byte{settings, frame(frameWindowUpdate, 0, 0, []byte{0, 0, 1, 0}), frame(framePriority, 0, 3, make([]byte, 5)), frame(99, 1, 5, []byte("?")), frame(framePing, 0x30, 1<<31, []byte("12345678")), frame(frameHeaders, flagEndHeaders, 1, request()), ping}, nil),
	} {
		f.Add(seed, 40)
	}
	f.Fuzz(func(t *testing.T, p []byte, cut int) {
		if len(p) > MaxFirst {
			return
		}
		p = append([]byte(preface), p...)
		cut = max(0, min(cut, len(p)))
		var g, whole Greeting
		say, err := g.Hear(p[:cut])
		if err == nil {
			var more []byte
			more, err = g.Hear(p)
			say = append(say, more...)
		}
		if all, at := whole.Hear(p); !bytes.Equal(say, all) || (err == nil) != (at == nil) || g.heard != whole.heard {
			t.Fatalf("in two parts %x, %v, at once %x, %v", say, err, all, at)
		}
		var want bytes.Buffer
		out := http2.NewFramer(&want, nil)
		in := http2.NewFramer(nil, bytes.NewReader(p[len(preface):whole.heard]))
		in.SetMaxReadFrameSize(1<<24 - 1)
		in.AllowIllegalReads = true
		n := 0
		for {
			head, err := in.ReadFrameHeader()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("%v of %x, which is answered", err, p)
			}
			fr, err := in.ReadFrameForHeader(head)
			if err != nil && head.Type <= frameContinue {
				t.Fatalf("%v: %v of %x, which is answered", head, err, p)
			}
			switch fr := fr.(type) {
			case *http2.SettingsFrame:
				if !fr.IsAck() {
					if n++; n == 1 {
						_ = out.WriteSettings()
					}
					_ = out.WriteSettingsAck()
				}
			case *http2.PingFrame:
				if !fr.IsAck() {
					_ = out.WritePing(true, fr.Data)
				}
			case *http2.HeadersFrame, *http2.DataFrame, *http2.ContinuationFrame, *http2.PushPromiseFrame:
				t.Fatalf("%v is passed over", fr)
			}
		}
		if !bytes.Equal(say, want.Bytes()) || n != whole.Settings() {
			t.Fatalf("%x is said to %x, want %x", say, p, want.Bytes())
		}
	})
}
