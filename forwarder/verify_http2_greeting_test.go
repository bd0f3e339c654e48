package forwarder

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sluice.dev/sluice/forwarder/internal/firstbytes"
	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/internal/testutil"
)

// frameNote describes a frame in few words.
func frameNote(f http2.Frame) string {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			return "ack"
		}
		n, _ := f.Value(http2.SettingMaxConcurrentStreams)
		return fmt.Sprintf("settings%d", n)
	case *http2.PingFrame:
		return map[bool]string{false: "ping ", true: "pong "}[f.IsAck()] + string(f.Data[:])
	case *http2.GoAwayFrame:
		return fmt.Sprintf("goaway %d %v", f.LastStreamID, f.ErrCode)
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("window %d", f.Increment)
	case *http2.MetaHeadersFrame:
		return fmt.Sprintf("headers %d", f.StreamID)
	}
	return strings.ToLower(f.Header().Type.String())
}

// frameList records the frames that reach one side.
type frameList struct {
	mu    sync.Mutex
	notes []string
	err   error
}

func (l *frameList) follow(r io.Reader, each func(http2.Frame)) {
	frames := http2.NewFramer(io.Discard, r)
	frames.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		f, err := frames.ReadFrame()
		l.mu.Lock()
		if err != nil {
			l.err = err
			l.mu.Unlock()
			return
		}
		l.notes = append(l.notes, frameNote(f))
		l.mu.Unlock()
		if each != nil {
			each(f)
		}
	}
}

func (l *frameList) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.notes, ", ")
}

func (l *frameList) end() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// plainServer answers as RFC 9113 says, and records what it hears.
func plainServer(t *testing.T) (s *server, hears *frameList) {
	t.Helper()
	hears = new(frameList)
	s = serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
		if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		say := http2.NewFramer(c, nil)
		_ = say.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 7})
		hears.follow(c, func(f http2.Frame) {
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if !f.IsAck() {
					_ = say.WriteSettingsAck()
				}
			case *http2.PingFrame:
				if !f.IsAck() {
					_ = say.WritePing(true, f.Data)
				}
			case *http2.MetaHeadersFrame:
				_, _ = c.Write(firstbytes.Frame2(1, 5, f.StreamID, []byte{0x88}))
			}
		})
	})
	return s, hears
}

// TestAClientOfHTTP2IsAnsweredBeforeItAsks compares what a client and a server hear from each other
// with what they would hear directly, apart from the first SETTINGS.
func TestAClientOfHTTP2IsAnsweredBeforeItAsks(t *testing.T) {
	if !namespaced(t) {
		return
	}
	const start = "settings0, ack"
	more := func(s *gatetest.Spoken) *gatetest.Spoken {
		_ = s.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		return s
	}
	ping := func(s *gatetest.Spoken, what string) *gatetest.Spoken { return s.Raw(http2.FramePing, 0, 0, what) }
	for _, row := range []struct {
		what  string
		say   *gatetest.Spoken
		hears string
		// After a request: what both hear in addition. A client that heard SETTINGS acknowledges
		// them once.
		then, server string
	}{
		{"SETTINGS", gatetest.NewSpoken(), start, "settings7, headers 1", "settings0, ack, headers 1"},
		{"SETTINGS twice", more(gatetest.NewSpoken()), start + ", ack", "settings7, headers 1", "settings0, settings0, ack, headers 1"},
		{"two PINGs", ping(ping(gatetest.NewSpoken(), "12345678"), "abcdefgh"), start + ", pong 12345678, pong abcdefgh", "settings7, headers 1", "settings0, ack, headers 1"},
		{"an answer to no PING", gatetest.NewSpoken().Raw(http2.FramePing, http2.FlagPingAck, 0, "12345678"), start, "settings7, headers 1", "settings0, pong 12345678, ack, headers 1"},
		{"WINDOW_UPDATE, PRIORITY, and a PING", ping(gatetest.NewSpoken().Raw(http2.FrameWindowUpdate, 0, 0, "\x00\x00\x01\x00").Raw(http2.FramePriority, 0, 3, "\x00\x00\x00\x00\x10"), "12345678"),
			start + ", pong 12345678", "settings7, headers 1", "settings0, window 256, priority, ack, headers 1"},
		{"a frame of no known type, with flags", gatetest.NewSpoken().Raw(0x16, 0xff, 0, "12345678"), start, "settings7, headers 1", "settings0, unknown_frame_type_22, ack, headers 1"},
		{"reserved bits", gatetest.NewSpoken().Raw(http2.FramePing, 0, 1<<31, "12345678").Raw(http2.FrameWindowUpdate, 0, 1<<31, "\x80\x00\x01\x00"), start + ", pong 12345678", "settings7, headers 1", "settings0, window 256, ack, headers 1"},

		{"a PING of a stream", gatetest.NewSpoken().Raw(http2.FramePing, 0, 1, "12345678"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a short PING", gatetest.NewSpoken().Raw(http2.FramePing, 0, 0, "1234"), "goaway 0 FRAME_SIZE_ERROR", "", ""},
		{"SETTINGS of a stream", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 1, ""), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"SETTINGS cut short", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "\x00\x03\x00"), "goaway 0 FRAME_SIZE_ERROR", "", ""},
		{"an acknowledgement that says something", gatetest.NewSpoken().Raw(http2.FrameSettings, http2.FlagSettingsAck, 0, "\x00\x03\x00\x00\x00\x01"), "goaway 0 FRAME_SIZE_ERROR", "", ""},
		{"a push that is neither on nor off", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "\x00\x02\x00\x00\x00\x02"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a window larger than any", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "\x00\x04\x80\x00\x00\x00"), "goaway 0 FLOW_CONTROL_ERROR", "", ""},
		{"frames smaller than any", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "\x00\x05\x00\x00\x3f\xff"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"frames larger than any", gatetest.NewSpoken().Raw(http2.FrameSettings, 0, 0, "\x00\x05\x01\x00\x00\x00"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a window that grows by nothing", gatetest.NewSpoken().Raw(http2.FrameWindowUpdate, 0, 0, "\x00\x00\x00\x00"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a window that grows too large", gatetest.NewSpoken().Raw(http2.FrameWindowUpdate, 0, 0, "\x7f\xff\x00\x00").Raw(http2.FrameWindowUpdate, 0, 0, "\x00\x00\x00\x01"), "goaway 0 FLOW_CONTROL_ERROR", "", ""},
		{"a window of no stream", gatetest.NewSpoken().Raw(http2.FrameWindowUpdate, 0, 1, "\x00\x00\x00\x01"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a reset of no stream", gatetest.NewSpoken().Raw(http2.FrameRSTStream, 0, 2, "\x00\x00\x00\x08"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"content of no stream", gatetest.NewSpoken().Data(1, true, "hello"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a stream that depends on itself", gatetest.NewSpoken().Raw(http2.FramePriority, 0, 3, "\x00\x00\x00\x03\x10"), "goaway 0 PROTOCOL_ERROR", "", ""},
		{"a block that cannot be decoded", gatetest.NewSpoken().Raw(http2.FrameHeaders, 5, 1, "\xff\x7f"), "goaway 0 COMPRESSION_ERROR", "", ""},
		{"more than is kept", gatetest.NewSpoken().Raw(0x16, 0, 0, strings.Repeat("x", 16000)).Raw(0x16, 0, 0, strings.Repeat("x", 1000)), "goaway 0 ENHANCE_YOUR_CALM", "", ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byRequest, nil)
			_, server := plainServer(t)
			c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			client := new(frameList)
			done := make(chan bool)
			go func() { client.follow(c, nil); close(done) }()
			_, _ = c.Write(row.say.Bytes())
			if row.server == "" {
				<-done
				// Its SETTINGS are acknowledged first if they came first.
				if got := strings.Replace(client.String(), start, "settings0", 1); got != "settings0, "+row.hears || !errors.Is(client.end(), io.EOF) {
					t.Errorf("the client hears %q, %v, want %q and the end", client.String(), client.end(), row.hears)
				}
				c.Close()
				testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
				if got := server.String(); got != "" {
					t.Errorf("the server hears %q", got)
				}
				return
			}
			testutil.Eventually(t, "the client is answered", func() bool { return client.String() == row.hears })
			if got := server.String(); got != "" {
				t.Errorf("the server hears %q before anything was judged", got)
			}
			row.say.Reset()
			_ = row.say.WriteSettingsAck() // of ours
			_, _ = c.Write(row.say.Request(1, "GET", "/open/1", "a.example").Bytes())
			testutil.Eventually(t, "the client gets the server's answer", func() bool { return client.String() == row.hears+", "+row.then })
			// From now on, everything goes to the server and back.
			row.say.Reset()
			_ = row.say.WriteSettingsAck() // of the server's
			_, _ = c.Write(more(ping(row.say, "-behind-")).Bytes())
			testutil.Eventually(t, "the client hears the server itself", func() bool { return client.String() == row.hears+", "+row.then+", pong -behind-, ack" })
			want := strings.Replace(row.server, "ack, headers 1", "headers 1, ack, ping -behind-, settings0", 1)
			if got := server.String(); got != want {
				t.Errorf("the server hears %q, want %q", got, want)
			}
		})
	}
}

// TestAnIdleClientOfHTTP2Stays has a client that asks for nothing for longer than first bytes are
// waited for.
func TestAnIdleClientOfHTTP2Stays(t *testing.T) {
	if !namespaced(t) {
		return
	}
	var clock runningClock
	g := newNamed(t, byRequest, func(c *Config) { c.Now = clock.now })
	_, server := plainServer(t)
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = c.SetDeadline(time.Now().Add(8 * time.Second))
	client := new(frameList)
	go client.follow(c, nil)
	say := gatetest.NewSpoken()
	_, _ = c.Write(say.Bytes())
	testutil.Eventually(t, "the client is answered", func() bool { return client.String() == "settings0, ack" })
	silent := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = silent.SetDeadline(time.Now().Add(8 * time.Second))
	testutil.Eventually(t, "one waits", func() bool {
		g.f.tcp.Checks.Mu.Lock()
		defer g.f.tcp.Checks.Mu.Unlock()
		return g.f.tcp.Checks.Flows.Len() == 1
	})
	clock.advance(2 * firstbytes.CheckTimeout)
	if _, err := silent.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("who says nothing: %v, want a reset", err)
	}
	say.Reset()
	_ = say.WriteSettingsAck()
	_, _ = c.Write(say.Request(1, "GET", "/open/1", "a.example").Bytes())
	testutil.Eventually(t, "it is served", func() bool { return client.String() == "settings0, ack, settings7, headers 1" })
	if got := server.String(); got != "settings0, headers 1" {
		t.Errorf("the server hears %q", got)
	}
}

// unheard is a waiter in a list.
type unheard struct{}

func (unheard) CheckExpired(bool) {}

// TestAnIdleClientOfHTTP2IsToldOfTheEnd has the far side close, or the client, or others come until
// there is no room for it.
func TestAnIdleClientOfHTTP2IsToldOfTheEnd(t *testing.T) {
	if !namespaced(t) {
		return
	}
	for _, row := range []struct{ what, hears string }{
		{"the far side", "settings0, ack, goaway 0 NO_ERROR"},
		{"the client", "settings0, ack"},
		{"others", "settings0, ack, goaway 0 NO_ERROR"},
	} {
		t.Run(row.what, func(t *testing.T) {
			g := newNamed(t, byRequest, nil)
			leave := make(chan bool)
			defer close(leave)
			s := serve(t, addrA.String()+":8080", func(c *net.TCPConn) {
				<-leave
				c.Close()
			})
			c := g.mustDial(s.at)
			_ = c.SetDeadline(time.Now().Add(8 * time.Second))
			client := new(frameList)
			go client.follow(c, nil)
			_, _ = c.Write(gatetest.NewSpoken().Bytes())
			testutil.Eventually(t, "it is answered", func() bool { return client.String() == "settings0, ack" })
			switch row.what {
			case "the far side":
				leave <- true
			case "the client":
				_ = c.CloseWrite()
			default:
				for range firstbytes.MaxChecks {
					g.f.tcp.Idle.Enter(new(firstbytes.Entry), unheard{}, 0)
				}
			}
			testutil.Eventually(t, "it hears the end", func() bool { return errors.Is(client.end(), io.EOF) })
			if got := client.String(); got != row.hears {
				t.Errorf("it hears %q, want %q", got, row.hears)
			}
			c.Close()
			testutil.Eventually(t, "the flow has ended", func() bool { return g.table.Len() == 0 })
			if n := g.f.Stats()["tcp_refused_by_first_bytes"]; n != 0 {
				t.Errorf("%d flows were refused", n)
			}
		})
	}
}
