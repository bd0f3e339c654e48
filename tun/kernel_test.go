package tun

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The same endpoint over a real device and the real kernel:
//
//	netns of the test's own ── tap or tun ── Endpoint ── netstack
//	10.0.2.100, fd00:2::100                              10.0.2.2, fd00:2::2, TCP echo on 7

// namespace runs functions in a network namespace of its own, on one locked thread.
type namespace struct{ work chan func() }

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	if f, err := os.OpenFile(cloneDevice, os.O_RDWR, 0); err != nil {
		t.Skipf("needs %s: %v", cloneDevice, err)
	} else {
		f.Close()
	}
	ns := &namespace{work: make(chan func())}
	ready := make(chan error)
	go func() { // ends with the test; the thread is never unlocked, so it dies with its namespace
		runtime.LockOSThread()
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range ns.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		close(ns.work)
		t.Skipf("needs to make a network namespace: %v", err)
	}
	t.Cleanup(func() { close(ns.work) })
	return ns
}

func (ns *namespace) do(t testing.TB, f func() error) {
	t.Helper()
	result := make(chan error)
	ns.work <- func() { result <- f() }
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

// kernelDevice makes a device in ns and brings it up with addresses.
func kernelDevice(t testing.TB, ns *namespace, cfg Config) (d *Device) {
	t.Helper()
	ns.do(t, func() (err error) {
		if d, err = Create(cfg); err != nil {
			return err
		}
		link, err := netlink.LinkByName(d.Name())
		if err != nil {
			return err
		}
		if got := link.Attrs().MTU; got != d.MTU() {
			return fmt.Errorf("the kernel's MTU is %d, not %d", got, d.MTU())
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, a := range []string{guest4 + "/24", guest6 + "/64"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		return nil
	})
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func kernelEndpoint(t testing.TB, d *Device) *Endpoint {
	t.Helper()
	e, err := NewEndpoint(d, EndpointConfig{LinkAddr: gatewayMAC})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Close()
		e.Wait()
	})
	poll(t, e)
	return e
}

// serveEcho answers on port 7 of both families until the test ends.
func serveEcho(t testing.TB, s *stack.Stack) {
	t.Helper()
	for host, p := range map[string]tcpip.NetworkProtocolNumber{gateway4: header.IPv4ProtocolNumber, gateway6: header.IPv6ProtocolNumber} {
		l, err := gonet.ListenTCP(s, tcpip.FullAddress{NIC: testNIC, Addr: address(host), Port: 7}, p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() { // ends when l is closed
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { // ends with its connection
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
	}
}

// echo sends size bytes and checks that they come back.
func echo(ns *namespace, t testing.TB, host string, size int64) {
	t.Helper()
	var c net.Conn
	ns.do(t, func() (err error) {
		c, err = net.DialTimeout("tcp", net.JoinHostPort(host, "7"), 10*time.Second)
		return err
	})
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent, sending := sha256.New(), make(chan error, 1)
	go func() { // ends when all is written or the deadline passes
		random := rand.NewChaCha8([32]byte{1})
		_, err := io.CopyN(io.MultiWriter(c, sent), random, size)
		if err == nil {
			err = c.(*net.TCPConn).CloseWrite()
		}
		sending <- err
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if err := errors.Join(err, <-sending); err != nil || n != size {
		t.Fatalf("%d of %d bytes came back: %v", n, size, err)
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Fatal("what came back is not what was sent")
	}
}

func ping(ns *namespace, t testing.TB, host string, size int) {
	t.Helper()
	if _, err := exec.LookPath("ping"); err != nil {
		t.Log("ping is not installed, so it is left out")
		return
	}
	ns.do(t, func() error {
		// The child is forked from this thread and so is in its namespace. One request:
		// behind a first reply ping waits for the last no longer than two round trips.
		out, err := exec.Command("ping", "-n", "-c", "1", "-W", "10", "-s", fmt.Sprint(size), host).CombinedOutput()
		if err != nil || !strings.Contains(string(out), " 0% packet loss") {
			return fmt.Errorf("ping -s %d %s: %v\n%s", size, host, err, out)
		}
		return nil
	})
}

func noDrops(t testing.TB, e *Endpoint) {
	t.Helper()
	for reason, n := range e.Stats().Dropped {
		if n != 0 {
			t.Errorf("%d frames were dropped for %s", n, reason)
		}
	}
}

func TestKernelDevice(t *testing.T) {
	for _, kind := range []Kind{TAP, TUN} {
		for _, mtu := range []int{1280, 1500, 9000, 65520} {
			for _, noOffload := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d/noOffload=%v", kind, mtu, noOffload), func(t *testing.T) {
					ns := newNamespace(t)
					e := kernelEndpoint(t, kernelDevice(t, ns, Config{Kind: kind, MTU: mtu, NoOffload: noOffload}))
					serveEcho(t, newStack(t, e, true))
					for _, host := range []string{gateway4, gateway6} {
						ping(ns, t, host, 56)
						ping(ns, t, host, mtu-100)
						echo(ns, t, host, 4<<20)
					}
					noDrops(t, e)
					s := e.Stats()
					if s.RxChecksumsFilled != 0 {
						t.Errorf("%d checksums were filled in", s.RxChecksumsFilled)
					}
					if usesGSO := s.RxGSO > 0 && s.TxGSO > 0; usesGSO == noOffload && mtu < 65520 {
						t.Errorf("%d segments in and %d out with noOffload %v", s.RxGSO, s.TxGSO, noOffload)
					}
				})
			}
		}
	}
}

func TestKernelQueues(t *testing.T) {
	ns := newNamespace(t)
	d := kernelDevice(t, ns, Config{Queues: 2, MTU: 1500})
	if !d.Features().MultiQueue || len(d.FDs()) != 2 {
		t.Fatalf("features %+v, %d descriptors", d.Features(), len(d.FDs()))
	}
	e := kernelEndpoint(t, d)
	serveEcho(t, newStack(t, e, true))
	// carried tells which of the queues carry frames, in and out.
	carried := func() (in, out [2]bool) {
		var before [2][2]uint64
		for i, q := range e.queues {
			before[i] = [2]uint64{q.count.rxFrames.Load(), q.count.txFrames.Load()}
		}
		for range 8 {
			echo(ns, t, gateway4, 256<<10)
		}
		for i, q := range e.queues {
			in[i], out[i] = q.count.rxFrames.Load() > before[i][0], q.count.txFrames.Load() > before[i][1]
		}
		return in, out
	}
	want := func(when string, attached int, in, out [2]bool) {
		t.Helper()
		if n, all := e.Queues(); n != attached || all != 2 {
			t.Errorf("%s: %d of %d queues are attached, want %d of 2", when, n, all, attached)
		}
		if gotIn, gotOut := carried(); gotIn != in || gotOut != out {
			t.Errorf("%s: in by %v, out by %v; want %v and %v", when, gotIn, gotOut, in, out)
		}
	}
	one, both := [2]bool{true, false}, [2]bool{true, true}
	want("at first", 1, one, one)
	for range 2 {
		if err := errors.Join(e.Spread(), e.Spread()); err != nil {
			t.Fatal(err)
		}
		want("spread", 2, both, both)
		e.Narrow()
		want("narrowed", 2, both, one) // the kernel sends a SYN to any
		if err := errors.Join(e.Gather(), e.Gather()); err != nil {
			t.Fatal(err)
		}
		want("gathered", 1, one, one)
	}
	noDrops(t, e)

	// The next worker finds them as they are.
	for _, spread := range []bool{false, true} {
		if spread {
			if err := e.Spread(); err != nil {
				t.Fatal(err)
			}
		}
		var fds []int
		for _, fd := range d.FDs() {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, dup)
		}
		next, err := Adopt(fds, Config{Queues: 2, MTU: 1500})
		if err != nil {
			t.Fatal(err)
		}
		if next.spare[0] || next.spare[1] == spread {
			t.Errorf("spread %v, and adopted with these spare: %v", spread, next.spare)
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	}
	e.Close()
	if err := e.Spread(); !errors.Is(err, ErrClosed) {
		t.Errorf("spreading a closed device: %v", err)
	}
}

// Flows that are under way lose nothing while queues come and go.
func TestKernelQueuesComeAndGoUnderTraffic(t *testing.T) {
	ns := newNamespace(t)
	e := kernelEndpoint(t, kernelDevice(t, ns, Config{Queues: 2, MTU: 1500}))
	serveEcho(t, newStack(t, e, true))
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() { // ends with stop
		for {
			for _, step := range []func() error{e.Spread, func() error { e.Narrow(); return nil }, e.Gather} {
				if err := step(); err != nil {
					ended <- err
					return
				}
				select {
				case <-stop:
					ended <- nil
					return
				case <-time.After(3 * time.Millisecond):
				}
			}
		}
	}()
	for range 4 {
		echo(ns, t, gateway4, 4<<20)
		echo(ns, t, gateway6, 4<<20)
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	noDrops(t, e)
}

func TestKernelPlainDispatcher(t *testing.T) {
	ns := newNamespace(t)
	e := kernelEndpoint(t, kernelDevice(t, ns, Config{}))
	serveEcho(t, newStack(t, e, false))
	echo(ns, t, gateway4, 1<<20)
	echo(ns, t, gateway6, 1<<20)
	noDrops(t, e)
	if e.Stats().RxChecksumsFilled == 0 {
		t.Error("no checksum was filled in")
	}
}

// A worker that dies leaves its device to the next one, with the frames that came
// in between.
func TestKernelAdopt(t *testing.T) {
	ns := newNamespace(t)
	cfg := Config{Name: "tap7", MTU: 1500}
	kept := kernelDevice(t, ns, cfg)
	if kept.Name() != "tap7" {
		t.Errorf("the device is called %s", kept.Name())
	}
	duplicate := func() *Device {
		t.Helper()
		fd, err := unix.FcntlInt(uintptr(kept.FDs()[0]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		d, err := Adopt([]int{fd}, Config{MTU: cfg.MTU})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := duplicate()
	if first.Name() != kept.Name() || first.Features() != kept.Features() {
		t.Errorf("adopted %s %+v, created %s %+v", first.Name(), first.Features(), kept.Name(), kept.Features())
	}
	e := kernelEndpoint(t, first)
	serveEcho(t, newStack(t, e, true))
	echo(ns, t, gateway4, 1<<20)
	e.Close()
	e.Wait()

	// Nobody is there: the kernel queues a datagram, whose ICMP error proves it read.
	var c net.Conn
	ns.do(t, func() (err error) {
		if c, err = net.Dial("udp4", gateway4+":9"); err == nil {
			_, err = c.Write([]byte("waiting"))
		}
		return err
	})
	defer c.Close()
	e = kernelEndpoint(t, duplicate())
	serveEcho(t, newStack(t, e, true))
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the queued datagram was answered by %v", err)
	}
	echo(ns, t, gateway4, 1<<20)
	if _, err := Adopt([]int{kept.FDs()[0]}, Config{Kind: TUN}); !errors.Is(err, ErrNotTunDevice) {
		t.Errorf("a TAP is adopted as a TUN: %v", err)
	}
	ns.do(t, func() error {
		if d, err := Create(cfg); !errors.Is(err, ErrExists) {
			_ = d.Close()
			return fmt.Errorf("a second %s: %v", cfg.Name, err)
		}
		return nil
	})
}

func TestKernelInterfaceDownIsACountedDrop(t *testing.T) {
	ns := newNamespace(t)
	d := kernelDevice(t, ns, Config{})
	e := kernelEndpoint(t, d)
	serveEcho(t, newStack(t, e, true))
	set := func(change func(netlink.Link) error) {
		ns.do(t, func() error {
			link, err := netlink.LinkByName(d.Name())
			if err != nil {
				return err
			}
			return change(link)
		})
	}
	set(netlink.LinkSetDown)
	write(t, e, outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, nil), 0))
	if n := e.Stats().Dropped[interfaceDown.String()]; n == 0 {
		t.Error("the drop is not counted")
	}
	if err := e.Err(); err != nil {
		t.Errorf("it ended the endpoint: %v", err)
	}
	set(netlink.LinkSetUp)
	echo(ns, t, gateway4, 64<<10)
}

func TestKernelDeletedDeviceEndsTheEndpoint(t *testing.T) {
	ns := newNamespace(t)
	d := kernelDevice(t, ns, Config{})
	e := kernelEndpoint(t, d)
	newStack(t, e, true)
	ns.do(t, func() error {
		link, err := netlink.LinkByName(d.Name())
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	if err := waitDone(t, e); !errors.Is(err, ErrDeviceGone) {
		t.Errorf("ended by %v", err)
	}
	pkt := outgoing(e, header.IPv4ProtocolNumber, 0, ipv4Packet(17, nil), 0)
	defer pkt.DecRef()
	if err := e.QDisc().WritePacket(pkt); err == nil {
		t.Error("a write after the end succeeds")
	}
	if _, err := d.HardwareAddr(); !errors.Is(err, ErrDeviceGone) {
		t.Errorf("its address is answered by %v", err)
	}
}
