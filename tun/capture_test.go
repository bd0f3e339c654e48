package tun

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// tshark prints the fields of each packet in file, separated by tabs.
func tshark(t *testing.T, file string, fields ...string) []string {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark")
	}
	args := []string{"-n", "-r", file, "-T", "fields"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var stderr bytes.Buffer
	cmd := exec.Command("tshark", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, stderr.Bytes())
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
}

func TestCaptureIsReadByTshark(t *testing.T) {
	for _, kind := range []Kind{TAP, TUN} {
		t.Run(kind.String(), func(t *testing.T) {
			file, err := os.Create(filepath.Join(t.TempDir(), "capture.pcapng"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			e, peer := newTwinEndpoint(t, Config{Kind: kind}, allOffloads)
			s := newSink(true)
			e.Attach(s)
			all, err := e.StartCapture(file, CaptureOptions{})
			if err != nil {
				t.Fatal(err)
			}
			var drops bytes.Buffer
			onlyDrops, err := e.StartCapture(&drops, CaptureOptions{DropsOnly: true})
			if err != nil {
				t.Fatal(err)
			}

			good := ipv4Packet(17, udpDatagram([]byte("good")))
			bad := edit(good, 8, 1) // the checksum does not cover this TTL
			inLink := func(ip []byte) []byte {
				if kind == TAP {
					ip = toGateway(etherIPv4, ip)
				}
				return withVnet(vnetHeader{}, ip)
			}
			send(t, peer, inLink(bad))
			send(t, peer, inLink(good))
			s.next(t)
			pkt := outgoing(e, header.IPv4ProtocolNumber, 0, good, 0)
			write(t, e, pkt)
			e.NoteDrop("egress[2] nothing to see here", good)

			for _, c := range []*Capture{all, onlyDrops} {
				if err := c.Stop(); err != nil {
					t.Fatal(err)
				}
				if n := c.Lost(); n != 0 {
					t.Errorf("%d packets were lost", n)
				}
			}
			if err := all.Stop(); err != nil {
				t.Errorf("stopping again: %v", err)
			}
			if n := bytes.Count(drops.Bytes(), []byte("good")); n != 2 {
				t.Errorf("the capture of drops has %d packets", n)
			}
			if path, err := exec.LookPath("tcpdump"); err != nil {
				t.Skip("needs tcpdump")
			} else if out, err := exec.Command(path, "-n", "-r", file.Name()).Output(); err != nil || bytes.Count(out, []byte("\n")) != 4 {
				t.Errorf("tcpdump: %v, and read\n%s", err, out)
			}
			got := tshark(t, file.Name(), "frame.interface_name", "frame.interface_description", "frame.packet_flags_direction", "ip.ttl", "udp.dstport", "frame.comment", "frame.time_epoch")
			const link = "twin0\tthe sandbox's link, seen from its gateway"
			refused := "twin0-drops\tpackets refused above the link; the comment is the reason"
			if kind == TUN {
				refused = link
			}
			want := []string{
				link + "\t0x00000001\t1\t7\trx-bad-ip-checksum\t",
				link + "\t0x00000001\t64\t7\t\t",
				link + "\t0x00000002\t64\t7\t\t",
				refused + "\t0x00000001\t64\t7\tegress[2] nothing to see here\t",
			}
			if len(got) != len(want) {
				t.Fatalf("tshark sees %d packets:\n%s", len(got), strings.Join(got, "\n"))
			}
			for i := range want {
				if !strings.HasPrefix(got[i], want[i]) {
					t.Errorf("packet %d is\n%q, want\n%q", i, got[i], want[i])
				}
				if _, fraction, _ := strings.Cut(got[i][len(want[i]):], "."); len(fraction) != 9 {
					t.Errorf("packet %d: the time is not in nanoseconds: %q", i, got[i])
				}
			}
		})
	}
}

// blockedWriter blocks in its first write until released.
type blockedWriter struct {
	bytes.Buffer
	entered, release chan struct{}
}

func (w *blockedWriter) Write(b []byte) (int, error) {
	if w.entered != nil {
		close(w.entered)
		w.entered = nil
		<-w.release
	}
	return w.Buffer.Write(b)
}

func TestSlowCaptureLosesPacketsAndHoldsNobodyUp(t *testing.T) {
	e, _ := newTwinEndpoint(t, Config{}, allOffloads)
	entered := make(chan struct{})
	w := &blockedWriter{entered: entered, release: make(chan struct{})}
	const room = 10
	packet := ipv4Packet(17, udpDatagram(make([]byte, 100)))
	c, err := e.StartCapture(w, CaptureOptions{QueueBytes: room * (recordOverhead + len(packet)), SnapLen: len(packet)})
	if err != nil {
		t.Fatal(err)
	}
	<-entered
	for range 3 * room { // returns although nothing is written
		e.NoteDrop("too fast", packet)
	}
	if n := c.Lost(); n != 2*room {
		t.Errorf("%d packets were lost, want %d", n, 2*room)
	}
	close(w.release)
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(w.Bytes(), []byte("too fast")); n != room {
		t.Errorf("%d packets were written, want %d", n, room)
	}
	if n := e.Stats().Noted; n != 3*room {
		t.Errorf("%d drops were noted", n)
	}
	lost := []byte{optStatisticsDropped, 0, 8, 0, 2 * room, 0, 0, 0, 0, 0, 0, 0}
	if !bytes.Contains(w.Bytes(), lost) {
		t.Error("the losses are not in the interface statistics")
	}
}

type fullDisk struct{}

var errFull = errors.New("no space left on device")

func (fullDisk) Write([]byte) (int, error) { return 0, errFull }

func TestFailedCaptureEndsAlone(t *testing.T) {
	e, peer := newTwinEndpoint(t, Config{}, allOffloads)
	s := newSink(true)
	e.Attach(s)
	c, err := e.StartCapture(fullDisk{}, CaptureOptions{})
	if err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := c.Stop(); !errors.Is(err, errFull) {
		t.Errorf("it ended with %v", err)
	}
	if n := len(e.activeCaptures()); n != 0 {
		t.Errorf("%d captures are still fed", n)
	}
	send(t, peer, withVnet(vnetHeader{}, udpFrame))
	s.next(t)
}

func TestCapturesAreBoundedAndEndWithTheEndpoint(t *testing.T) {
	e, _ := newTwinEndpoint(t, Config{}, allOffloads)
	var running []*Capture
	for range MaxCaptures {
		c, err := e.StartCapture(new(bytes.Buffer), CaptureOptions{})
		if err != nil {
			t.Fatal(err)
		}
		running = append(running, c)
	}
	if _, err := e.StartCapture(new(bytes.Buffer), CaptureOptions{}); !errors.Is(err, ErrTooManyCaptures) {
		t.Errorf("one more: %v", err)
	}
	e.Close()
	for _, c := range running {
		<-c.Done()
	}
	if _, err := e.StartCapture(new(bytes.Buffer), CaptureOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}
