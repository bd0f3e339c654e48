package tun

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Captures. The packet path copies a packet into a pooled record and puts that on a
// bounded queue, or counts a loss if the queue is full; it never waits. One goroutine
// per capture encodes records and writes them. With no capture running the cost
// is one atomic load per packet.
//
// A file has two interfaces. The device has every frame as it was on the wire (checksums left to
// offload look wrong there, as in any capture on a sending host). "NAME-drops" has the IP packets
// that were refused above the link, each with the reason as its comment. Frames that the endpoint
// itself refused carry their reason as a comment on the device's interface. Both have the device's
// link type, because tcpdump and other libpcap programs reject a file with two: on a TAP, a refused
// packet has an Ethernet header to our address, from the zero address. The file of a TUN has only
// the device's interface, which includes the refused packets: libpcap mistakes a second interface
// of bare IP packets for one of another type.

// ErrTooManyCaptures is returned when MaxCaptures are running.
var ErrTooManyCaptures = errors.New("too many captures are running")

// Bounds of captures.
const (
	MaxCaptures         = 8 // per endpoint
	DefaultCaptureQueue = 4 << 20
	defaultSnapLen      = 262144 // tcpdump's; more than any frame
	// recordOverhead is the cost of a queued record beyond its bytes, so that a flood of small
	// packets is bounded too.
	recordOverhead = 256
	maxRecords     = 1 << 16
)

// CaptureOptions selects packets. The zero value captures all packets in full.
type CaptureOptions struct {
	SnapLen    int  // bytes kept of each packet; 0 means all
	DropsOnly  bool // only packets dropped by the endpoint or passed to NoteDrop
	QueueBytes int  // bound on the bytes waiting to be written; 0 means DefaultCaptureQueue
}

type captureInterface uint32

const (
	frameInterface captureInterface = iota
	dropInterface
	numCaptureInterfaces
)

// record is one packet on its way to the writer.
type record struct {
	when      time.Time
	iface     captureInterface
	direction direction
	length    int // on the wire
	charge    int // against the queue's bound
	comment   string
	data      []byte
}

var recordPool = sync.Pool{New: func() any { return new(record) }}

// Capture is a running capture.
type Capture struct {
	e         *Endpoint
	out       pcapngWriter
	snapLen   int
	dropsOnly bool
	limit     int64
	started   time.Time

	queued  atomic.Int64 // bytes charged for records in the queue
	offered [numCaptureInterfaces]atomic.Uint64
	lost    [numCaptureInterfaces]atomic.Uint64

	mu      sync.RWMutex // held for reading to send, for writing to close
	ended   bool         // guarded by mu: records is closed
	records chan *record // closed by end

	done chan struct{} // closed by write when it has returned
	err  error         // set before done is closed
}

// StartCapture starts writing a pcapng file to w. The capture runs until Stop, until a write fails,
// or until the endpoint is closed. A slow or failing w does not affect the packets.
func (e *Endpoint) StartCapture(w io.Writer, opt CaptureOptions) (*Capture, error) {
	if opt.SnapLen <= 0 {
		opt.SnapLen = defaultSnapLen
	}
	if opt.QueueBytes <= 0 {
		opt.QueueBytes = DefaultCaptureQueue
	}
	c := &Capture{
		e:         e,
		out:       pcapngWriter{w: w},
		snapLen:   opt.SnapLen,
		dropsOnly: opt.DropsOnly,
		limit:     int64(opt.QueueBytes),
		started:   time.Now(),
		records:   make(chan *record, min(maxRecords, 1+opt.QueueBytes/recordOverhead)),
		done:      make(chan struct{}),
	}
	if err := e.addCapture(c); err != nil {
		return nil, fmt.Errorf("starting a capture: %w", err)
	}
	go c.write() // owned by c; ends after end
	return c, nil
}

func (e *Endpoint) addCapture(c *Capture) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing.Load() {
		return ErrClosed
	}
	running := e.activeCaptures()
	if len(running) >= MaxCaptures {
		return ErrTooManyCaptures
	}
	next := append(append([]*Capture(nil), running...), c)
	e.captures.Store(&next)
	return nil
}

func (e *Endpoint) removeCapture(c *Capture) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var next []*Capture
	for _, other := range e.activeCaptures() {
		if other != c {
			next = append(next, other)
		}
	}
	if next == nil {
		e.captures.Store(nil)
		return
	}
	e.captures.Store(&next)
}

func (e *Endpoint) activeCaptures() []*Capture {
	if p := e.captures.Load(); p != nil {
		return *p
	}
	return nil
}

// NoteDrop passes a packet that was refused above the link, with the reason, to the captures. pkt
// starts with the IP header; it is copied.
func (e *Endpoint) NoteDrop(reason string, pkt []byte) {
	e.noted.Add(1)
	var room [ethernetHeaderLen]byte
	head := e.dropHeader(&room, pkt)
	for _, c := range e.activeCaptures() {
		if r := c.reserve(dropInterface, inbound, len(head)+len(pkt), reason); r != nil {
			r.data = append(append(r.data, head...), pkt...)
			r.data = r.data[:min(len(r.data), c.snapLen)]
			c.commit(r)
		}
	}
}

// dropHeader returns the link header that NoteDrop's packets get in a file.
func (e *Endpoint) dropHeader(room *[ethernetHeaderLen]byte, pkt []byte) []byte {
	if e.filter.kind != TAP {
		return nil
	}
	proto := header.IPv4ProtocolNumber
	if header.IPVersion(pkt) == header.IPv6Version {
		proto = header.IPv6ProtocolNumber
	}
	header.Ethernet(room[:]).Encode(&header.EthernetFields{DstAddr: e.gateway, Type: proto})
	return room[:]
}

// captureTx passes a packet that was written, or could not be, to the captures.
func captureTx(captures []*Capture, pkt *stack.PacketBuffer, size int, why reason) {
	for _, c := range captures {
		comment := ""
		if why != reasonNone {
			comment = why.String()
		} else if c.dropsOnly {
			continue
		}
		if r := c.reserve(frameInterface, outbound, size, comment); r != nil {
			r.data = appendPacket(r.data, pkt, c.snapLen)
			c.commit(r)
		}
	}
}

// reserve takes room in the queue for a packet of length bytes. The caller appends the packet to
// the record's data and commits it. If there is no room, reserve counts the loss and returns nil.
func (c *Capture) reserve(iface captureInterface, d direction, length int, comment string) *record {
	c.offered[iface].Add(1)
	charge := recordOverhead + min(length, c.snapLen)
	if c.queued.Add(int64(charge)) > c.limit {
		c.queued.Add(-int64(charge))
		c.lost[iface].Add(1)
		return nil
	}
	r := recordPool.Get().(*record)
	*r = record{
		when: time.Now(), iface: iface, direction: d,
		length: length, charge: charge, comment: comment, data: r.data[:0],
	}
	return r
}

// commit queues a filled record.
func (c *Capture) commit(r *record) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.ended {
		select {
		case c.records <- r:
			return
		default:
		}
	}
	c.lost[r.iface].Add(1)
	c.recycle(r)
}

func (c *Capture) recycle(r *record) {
	c.queued.Add(-int64(r.charge))
	recordPool.Put(r)
}

// end stops the intake; queued records are still written.
func (c *Capture) end() {
	c.e.removeCapture(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.ended = true
		close(c.records)
	}
}

// Stop ends the capture, waits until everything queued is written, and returns the first write
// error. If w can block for ever, close or unblock it first.
func (c *Capture) Stop() error {
	c.end()
	<-c.done
	return c.err
}

// Done is closed when the capture has ended, for any reason.
func (c *Capture) Done() <-chan struct{} { return c.done }

// Lost returns how many packets the capture had no room for.
func (c *Capture) Lost() uint64 {
	return c.lost[frameInterface].Load() + c.lost[dropInterface].Load()
}

// write is the capture's goroutine.
func (c *Capture) write() {
	defer close(c.done)
	err := c.writeFile()
	c.end()
	for r := range c.records { // after a failed write, drain the rest
		c.recycle(r)
	}
	if err != nil {
		c.err = fmt.Errorf("writing a capture of %s: %w", c.e.device.name, err)
	}
}

func (c *Capture) writeFile() error {
	name, linkType := c.e.device.name, uint16(linkTypeEthernet)
	if c.e.filter.kind == TUN {
		linkType = linkTypeRaw
	}
	if err := c.out.section("sluice"); err != nil {
		return err
	}
	if err := c.out.describe(linkType, c.snapLen, name, "the sandbox's link, seen from its gateway"); err != nil {
		return err
	}
	one := linkType == linkTypeRaw
	if !one {
		if err := c.out.describe(linkType, c.snapLen, name+"-drops", "packets refused above the link; the comment is the reason"); err != nil {
			return err
		}
	}
	for r := range c.records {
		iface := r.iface
		if one {
			iface = frameInterface
		}
		err := c.out.packet(r, iface)
		c.recycle(r)
		if err != nil {
			return err
		}
	}
	now := time.Now()
	offered, lost := [...]uint64{c.offered[frameInterface].Load(), c.offered[dropInterface].Load()}, [...]uint64{c.lost[frameInterface].Load(), c.lost[dropInterface].Load()}
	if one {
		return c.out.statistics(frameInterface, c.started, now, offered[0]+offered[1], lost[0]+lost[1])
	}
	for i := range numCaptureInterfaces {
		if err := c.out.statistics(i, c.started, now, offered[i], lost[i]); err != nil {
			return err
		}
	}
	return nil
}
