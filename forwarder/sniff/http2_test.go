package sniff

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// walkFrames has Frames read all of p and yields each frame, with the request that it begins, if
// any. It stops at the first frame that is malformed or does not end.
func walkFrames(t testing.TB, p []byte, yield func(at int, fr Frame, req StreamRequest)) error {
	t.Helper()
	var f Frames
	for off := 0; off < len(p); {
		fr, need, err := f.Next(p[off:])
		var req StreamRequest
		size := fr.Size
		if err == nil && need == 0 && fr.Fields {
			req, need, err = f.Fields(p[off:])
			size = req.Size
		}
		switch {
		case err != nil:
			return err
		case need > 0 && need <= len(p)-off:
			t.Fatalf("of %d bytes, %d are asked for", len(p)-off, need)
		case need > 0 || off+size > len(p):
			return io.ErrUnexpectedEOF
		case size < frameHeader:
			t.Fatalf("a frame of %d bytes", size)
		}
		yield(off, fr, req)
		off += size
	}
	return nil
}

func request(kv ...string) []byte {
	return headers(append([]string{":method", "GET", ":scheme", "http", ":authority", "a.example", ":path", "/"}, kv...)...)
}

// FuzzFrames compares the walk with the golang.org/x/net reader: it must read any bytes that we let
// pass as the same frames and the same requests.
func FuzzFrames(f *testing.F) {
	settings := frame(frameSettings, 0, 0, []byte{0, 3, 0, 0, 0, 100})
	for _, seed := range [][]byte{
		h2(nil, request())[len(preface):],
		bytes.Join([][]byte{settings, frame(frameHeaders, flagEndHeaders, 1, request("content-length", "3")), frame(frameData, flagEndStream|flagPadded, 1, []byte("\x01abc\x00"))}, nil),
		bytes.Join([][]byte{settings, frame(framePing, 0, 0, make([]byte, 8)), frame(framePriority, 0, 9, make([]byte, 5)), frame(frameWindowUpdate, 0, 0, []byte{0, 0, 0, 1})}, nil),
		bytes.Join([][]byte{settings, frame(frameHeaders, flagEndHeaders, 1, request()), frame(frameHeaders, flagEndHeaders|flagEndStream, 1, headers("x", "y")), frame(frameReset, 0, 1, make([]byte, 4)), frame(99, 7, 3, []byte("?"))}, nil),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 4*MaxFirst {
			return
		}
		read := bytes.NewReader(p)
		theirs := http2.NewFramer(io.Discard, read)
		theirs.SetMaxReadFrameSize(1<<24 - 1)
		theirs.ReadMetaHeaders = hpack.NewDecoder(hpackTable, nil)
		theirs.ReadMetaHeaders.SetAllowedMaxDynamicTableSize(maxHpackTable)
		gone := false
		_ = walkFrames(t, p, func(at int, fr Frame, req StreamRequest) {
			if gone {
				return
			}
			if begins := len(p) - read.Len(); begins != at {
				t.Fatalf("a frame at %d, theirs at %d", at, begins)
			}
			got, err := theirs.ReadFrame()
			if err != nil {
				// It also checks values that are left to the server, and frames that were defined
				// later.
				typ := p[at+3]
				if gone = typ == frameSettings || typ == frameWindowUpdate || typ > frameContinue; !gone {
					t.Fatalf("%+v %+v at %d is let through, theirs: %v", fr, req, at, err)
				}
				return
			}
			head := got.Header()
			if head.StreamID != fr.Stream {
				t.Fatalf("stream %d, theirs %d", fr.Stream, head.StreamID)
			}
			switch got := got.(type) {
			case *http2.DataFrame:
				if len(got.Data()) != fr.Data || got.StreamEnded() != fr.End {
					t.Fatalf("%+v, theirs %d bytes, end %v", fr, len(got.Data()), got.StreamEnded())
				}
			case *http2.MetaHeadersFrame:
				if !fr.Fields || got.StreamEnded() != req.End || got.Truncated {
					t.Fatalf("%+v %+v, theirs %+v", fr, req, got)
				}
				sameRequest(t, req, got)
			case *http2.RSTStreamFrame:
				if !fr.Reset {
					t.Fatalf("%+v is a reset", fr)
				}
			case *http2.SettingsFrame:
				if fr.Ack != got.IsAck() {
					t.Fatalf("%+v, theirs %v", fr, got)
				}
			case *http2.PushPromiseFrame, *http2.ContinuationFrame:
				t.Fatalf("%v is let through", got)
			}
		})
	})
}

// sameRequest compares a request with the fields that the other reader found.
func sameRequest(t *testing.T, req StreamRequest, theirs *http2.MetaHeadersFrame) {
	t.Helper()
	if req.Trailers {
		if len(theirs.PseudoFields()) > 0 || !req.End {
			t.Fatalf("trailers %+v, theirs %+v", req, theirs.Fields)
		}
		return
	}
	authority := theirs.PseudoValue("authority")
	for _, field := range theirs.RegularFields() {
		if field.Name == "host" {
			if authority != "" && !strings.EqualFold(authority, field.Value) {
				t.Fatalf("authority %q and Host %q are let through", authority, field.Value)
			}
			authority = field.Value
		}
	}
	name, ok := hostOf(authority)
	path, _, _ := strings.Cut(theirs.PseudoValue("path"), "?")
	if req.Upgrade {
		path = ""
	}
	if theirs.PseudoValue("method") != req.Method || path != req.Path || authority != "" && (!ok || !strings.EqualFold(name, req.Name)) {
		t.Fatalf("%+v, theirs %+v", req, theirs.Fields)
	}
}

// FuzzFrameEnds compares the boundaries found byte by byte, and all at once, with those visible
// when everything is there.
func FuzzFrameEnds(f *testing.F) {
	f.Add(bytes.Join([][]byte{frame(frameSettings, 0, 0, nil), frame(frameHeaders, 0, 1, []byte("abc")), frame(frameContinue, flagEndHeaders, 1, nil), frame(frameData, flagEndStream, 1, []byte("x"))}, nil), 7)
	f.Fuzz(func(t *testing.T, p []byte, cut int) {
		free := map[int]bool{0: true}
		block := false
		for at := 0; len(p)-at >= frameHeader; {
			if typ := p[at+3]; typ == frameHeaders || typ == framePush || typ == frameContinue {
				block = p[at+4]&flagEndHeaders == 0
			}
			at += frameHeader + length(p[at:])
			free[at] = !block
		}
		var slow FrameEnds
		for n := range p {
			if (slow.Until() == 0) != free[n] || slow.Until() < 0 {
				t.Fatalf("after %d bytes: until %d, free %v", n, slow.Until(), free[n])
			}
			slow.Feed(p[n : n+1])
		}
		var fast FrameEnds
		cut = max(0, min(cut, len(p)))
		fast.Feed(p[:cut])
		fast.Feed(p[cut:])
		if fast.Until() != slow.Until() || fast.Begun() != slow.Begun() {
			t.Fatalf("in two parts: until %d, byte by byte %d", fast.Until(), slow.Until())
		}
	})
}

func TestFrameEndsTellsWhichStreamsEnded(t *testing.T) {
	var ended []uint32
	e := FrameEnds{Ended: func(id uint32, reset bool) {
		if reset {
			id += 1000
		}
		ended = append(ended, id)
	}}
	e.Feed(bytes.Join([][]byte{
		frame(frameSettings, flagAck, 0, nil), frame(frameHeaders, flagEndHeaders, 1, []byte("a")), frame(frameData, flagEndStream, 1, []byte("b")),
		frame(frameHeaders, flagEndStream|flagEndHeaders, 3, nil), frame(frameReset, 0, 5, make([]byte, 4)), frame(framePing, 1, 0, make([]byte, 8)),
	}, nil))
	if len(ended) != 3 || ended[0] != 1 || ended[1] != 3 || ended[2] != 1005 {
		t.Errorf("%v", ended)
	}
}

// first starts a connection whose first request consists of these frames.
func first(frames ...[]byte) []byte {
	return bytes.Join(append([][]byte{[]byte(preface), frame(frameSettings, 0, 0, nil)}, frames...), nil)
}

func TestHeaderBlocksAreBounded(t *testing.T) {
	flood := [][]byte{frame(frameHeaders, 0, 1, nil)}
	for range 2 * MaxFirst / frameHeader {
		flood = append(flood, frame(frameContinue, 0, 1, nil))
	}
	indexed := func(n int) []byte {
		return append(request("x", strings.Repeat("y", 4000)), bytes.Repeat([]byte{0xbe}, n)...)
	}
	grown := append([]byte{0x3f, 0xe1, 0xff, 0x03}, request()...) // 65536
	for _, row := range []struct {
		what string
		say  []byte
		err  error
	}{
		{"a flood of empty CONTINUATIONs", first(flood...), ErrTooLong},
		{"a frame larger than any", first(frame(frameHeaders, flagEndHeaders, 1, make([]byte, frameMax+1))), ErrMalformed},
		{"a frame that fits nowhere", first(frame(frameHeaders, flagEndHeaders, 1, make([]byte, frameMax))), ErrTooLong},
		{"two that do not", first(frame(frameHeaders, 0, 1, make([]byte, 10000)), frame(frameContinue, flagEndHeaders, 1, make([]byte, 10000))), ErrTooLong},
		{"a small block of many fields", first(frame(frameHeaders, flagEndHeaders, 1, indexed(15))), nil},
		{"a small block of too many", first(frame(frameHeaders, flagEndHeaders, 1, indexed(16))), ErrMalformed},
		{"a value that grows out of bounds", first(frame(frameHeaders, flagEndHeaders, 1, request("x", strings.Repeat("a", maxFieldLen+1)))), ErrMalformed},
		{"the largest table", first(frame(frameHeaders, flagEndHeaders, 1, grown)), nil},
		{"a larger one", first(frame(frameHeaders, flagEndHeaders, 1, append([]byte{0x3f, 0xe2, 0xff, 0x03}, request()...))), ErrMalformed},
		{"an index into nothing", first(frame(frameHeaders, flagEndHeaders, 1, append(request(), 0xff, 0x7f))), ErrMalformed},
		{"a block that ends in the middle of a field", first(frame(frameHeaders, flagEndHeaders, 1, append(request(), 0x40, 5, 'x'))), ErrMalformed},
	} {
		t.Run(row.what, func(t *testing.T) {
			if s, _, err := feed(t, row.say); !errors.Is(err, row.err) || err == nil && s.Name != "a.example" {
				t.Errorf("%+v, %v, want %v", s, err, row.err)
			}
		})
	}
}

// TestWhatAConnectionKeeps bounds the memory of a table filled with the most expensive entries.
func TestWhatAConnectionKeeps(t *testing.T) {
	block := append([]byte{0x3f, 0xe1, 0xff, 0x03}, request()...)
	var filled [][]byte
	id := uint32(1)
	for n := 0; n < 2*maxHpackTable/34; {
		for ; len(block) < 4000; n++ {
			block = append(block, 0x40, 2, 'a'+byte(n%26), '0'+byte(n/26%10), 0)
		}
		filled = append(filled, frame(frameHeaders, flagEndHeaders|flagEndStream, id, block))
		block, id = request(), id+2
	}
	p := append(frame(frameSettings, 0, 0, nil), bytes.Join(filled, nil)...)
	var before, after runtime.MemStats
	kept := make([]*Frames, 20)
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range kept {
		f := new(Frames)
		for off := 0; off < len(p); {
			fr, _, err := f.Next(p[off:])
			size := fr.Size
			if err == nil && fr.Fields {
				var req StreamRequest
				req, _, err = f.Fields(p[off:])
				size = req.Size
			}
			if err != nil {
				t.Fatal(err)
			}
			off += size
		}
		kept[i] = f
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int(after.HeapAlloc-before.HeapAlloc) / len(kept)
	runtime.KeepAlive(kept)
	t.Logf("%d bytes a connection", each)
	if each < maxHpackTable/2 || each > 12*maxHpackTable {
		t.Errorf("%d bytes a connection, want at most twelve times %d", each, maxHpackTable)
	}
}

func TestContentIsWalkedWithoutAllocating(t *testing.T) {
	var f Frames
	p := bytes.Join([][]byte{frame(frameSettings, 0, 0, nil), frame(frameHeaders, flagEndHeaders, 1, request())}, nil)
	_, _, _ = f.Next(p)
	if req, _, err := f.Fields(p[frameHeader:]); err != nil || req.Length != -1 {
		t.Fatal(req, err)
	}
	data := frame(frameData, 0, 1, make([]byte, 100))
	var e FrameEnds
	if n := testing.AllocsPerRun(100, func() {
		if fr, _, err := f.Next(data); err != nil || fr.Data != 100 {
			t.Fatal(fr, err)
		}
		e.Feed(data)
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}
