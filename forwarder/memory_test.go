package forwarder

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"sluice.dev/sluice/forwarder/internal/admit"
	"sluice.dev/sluice/forwarder/internal/count"
	"sluice.dev/sluice/forwarder/internal/netstack"
	"sluice.dev/sluice/forwarder/internal/packet"
	"sluice.dev/sluice/forwarder/internal/tcpmem"
	"sluice.dev/sluice/internal/testutil"
)

// checkRepaid checks that an ended forwarder has given everything back.
func checkRepaid(t testing.TB, m *admit.Memory) {
	t.Helper()
	if used, flows := m.Used.Load(), m.Flows.Load(); used != 0 || flows != 0 {
		t.Errorf("%d bytes of the memory budget are still charged, to %d flows", used, flows)
	}
}

func testMemory(t testing.TB, high int64) (*admit.Memory, *[]bool) {
	t.Helper()
	turns := new([]bool)
	m, err := admit.NewMemory(new(count.Set), admit.MarksBelow(high), func(pressed bool) { *turns = append(*turns, pressed) })
	if err != nil {
		t.Fatal(err)
	}
	return m, turns
}

func TestMemoryMarks(t *testing.T) {
	m, turns := testMemory(t, 16<<20) // low 6, pressure 8
	for _, row := range []struct {
		what    string
		used    int64 // MiB
		pressed bool
		limit   int64
	}{
		{"below low nobody is pressed", 5, false, admit.FlowMost},
		{"nor between low and pressure", 7, false, admit.FlowMost},
		{"nor at pressure", 8, false, admit.FlowMost},
		{"above it everybody gets a share", 9, true, admit.FlowPressed},
		{"which stays so below it", 7, true, admit.FlowPressed},
		{"and at low", 6, true, admit.FlowPressed},
		{"but not below", 5, false, admit.FlowMost},
		{"past half way to high only the minimum is left", 13, true, admit.FlowMinimum},
		{"and at high", 16, true, admit.FlowMinimum},
		{"and above, if it came to that", 17, true, admit.FlowMinimum},
	} {
		m.Add(row.used<<20 - m.Used.Load())
		if got := m.Pressed.Load(); got != row.pressed {
			t.Errorf("%s: pressed is %v", row.what, got)
		}
		if got := m.Limit(false); got != row.limit {
			t.Errorf("%s: a flow may hold %d, not %d", row.what, got, row.limit)
		}
	}
	if len(*turns) != 3 || m.Entered.Load() != 2 {
		t.Errorf("told of %v, entered %d times", *turns, m.Entered.Load())
	}
}

func TestMemoryAtHighLetsNobodyIn(t *testing.T) {
	m, _ := testMemory(t, admit.LeastMemory)
	var in []*admit.Shares
	for {
		s := new(admit.Shares)
		if !m.Admit(s) {
			s.Leave() // a refused flow may do this too
			break
		}
		in = append(in, s)
	}
	if want := admit.LeastMemory / (2 * admit.FlowMinimum); len(in) != want {
		t.Errorf("%d flows were let in, not %d", len(in), want)
	}
	if m.Admit(nil) {
		t.Error("a flow that holds nothing was let in")
	}
	if m.Refused.Load() != 2 {
		t.Errorf("%d refusals were counted", m.Refused.Load())
	}
	in[0].Leave()
	in[0].Leave()
	if in[0] = new(admit.Shares); !m.Admit(nil) || !m.Admit(in[0]) {
		t.Error("what one flow gave back lets no other in")
	}
	for _, s := range in {
		s.Leave()
	}
	checkRepaid(t, m)
}

// The charges of many goroutines add up to the plain sum of what each holds.
func TestMemoryChargesAddUp(t *testing.T) {
	m, _ := testMemory(t, 1<<30)
	const holders, steps = 8, 2000
	all := make([]admit.Shares, holders)
	for i := range all {
		if !m.Admit(&all[i]) {
			t.Fatal("not admitted")
		}
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(w)))
			for range steps {
				s := &all[rng.IntN(holders)]
				switch rng.IntN(4) {
				case 0:
					s.Up.Set(rng.Int64N(1 << 20))
				case 1:
					s.Down.Set(rng.Int64N(1 << 20))
				case 2:
					s.Down.Try(1000)
				case 3:
					if rng.IntN(50) == 0 {
						s.Leave()
					}
				}
			}
		})
	}
	wg.Wait()
	var sum int64
	for i := range all {
		sum += max(all[i].Up.Held.Load(), 0) + max(all[i].Down.Held.Load(), 0)
	}
	if m.Used.Load() != sum {
		t.Errorf("%d bytes are charged, the holders hold %d", m.Used.Load(), sum)
	}
	for i := range all {
		all[i].Leave()
		all[i].Up.Set(99) // too late
		all[i].Down.Try(99)
	}
	checkRepaid(t, m)
}

// A few flows reach the pressure. Then many come, hold what they may, and stand still.
func TestMemorySharesLeaveRoomForOthers(t *testing.T) {
	for _, row := range []struct {
		what   string
		up     int64 // what each of the many holds for the sandbox
		moving int64 // the least that a moving one may hold
	}{
		{"downloads", 0, 64 << 10},
		{"both ways, a window under pressure each", tcpmem.ReceiveOffered * 3 / 4, admit.FlowMinimum},
	} {
		m, _ := testMemory(t, admit.DefaultMemory)
		few := make([]admit.Shares, 100)
		for i := range few {
			m.Admit(&few[i])
			few[i].Down.Set(m.Pressure.Load()/100 + 1)
		}
		many := make([]admit.Shares, 5000)
		for i := range many {
			if !m.Admit(&many[i]) {
				t.Fatalf("%s: flow %d of those that stand still was refused at %d bytes", row.what, i, m.Used.Load())
			}
			many[i].Down.Set(m.Limit(false))
			many[i].Up.Set(max(row.up, admit.FlowMinimum))
		}
		if !m.Admit(new(admit.Shares)) {
			t.Errorf("%s: the next flow is refused at %d bytes", row.what, m.Used.Load())
		}
		if got := m.Limit(true); got < row.moving {
			t.Errorf("%s: a flow that moves may hold %d bytes", row.what, got)
		}
	}
}

func TestParseMemory(t *testing.T) {
	for _, row := range []struct {
		value string
		want  admit.MemoryMarks
	}{
		{"4096 8192 16384", admit.MemoryMarks{Low: 16 << 20, Pressure: 32 << 20, High: 64 << 20}},
		{" 1\t2\n2048 ", admit.MemoryMarks{Low: 4096, Pressure: 8192, High: 8 << 20}},
		{"1 2048 2048", admit.MemoryMarks{Low: 4096, Pressure: 8 << 20, High: 8 << 20}},
		{"", admit.MemoryMarks{}},
		{"65536", admit.MemoryMarks{}},
		{"1 2 3 4096", admit.MemoryMarks{}},
		{"1 2 2047", admit.MemoryMarks{}},
		{"0 2 4096", admit.MemoryMarks{}},
		{"3 2 4096", admit.MemoryMarks{}},
		{"1 4097 4096", admit.MemoryMarks{}},
		{"-1 2 4096", admit.MemoryMarks{}},
		{"1 2 4096k", admit.MemoryMarks{}},
		{"1 2 9223372036854775807", admit.MemoryMarks{}},
		{"1 2 18446744073709555712", admit.MemoryMarks{}},
	} {
		got, err := admit.ParseMemory(row.value)
		if got != row.want || (err == nil) != (row.want != admit.MemoryMarks{}) {
			t.Errorf("%q: %+v, %v", row.value, got, err)
		}
		if err == nil {
			if again, err := admit.ParseMemory(got.String()); err != nil || again != got {
				t.Errorf("%q: what it prints as is read as %+v, %v", row.value, again, err)
			}
		}
	}
}

// FuzzSendLedger drives the ledger and a list of every write side by side.
func FuzzSendLedger(f *testing.F) {
	f.Add([]byte{0, 1, 0, 1, 0, 1, 1, 255})
	f.Add(bytes.Repeat([]byte{0, 0, 0, 200, 1, 3}, 200))
	f.Fuzz(func(t *testing.T, ops []byte) {
		var l tcpmem.SendLedger
		type write struct{ end, cost int }
		var writes []write
		written, acked := 0, 0
		for ; len(ops) >= 2; ops = ops[2:] {
			if ops[0]%3 < 2 {
				n := 1 + int(ops[1])
				if ops[0]%2 == 1 {
					n *= 1000
				}
				written += n
				cost := netstack.SegmentOverhead + netstack.ChunksFor(n)
				l.Wrote(n)
				writes = append(writes, write{written, cost})
			} else {
				acked += (written - acked) * int(ops[1]) / 255
				l.Settle(written - acked)
			}
			var exact, largest int
			for _, w := range writes {
				if w.end > acked {
					exact += w.cost
				}
				largest = max(largest, w.cost)
			}
			if l.Held < int64(exact) {
				t.Fatalf("%d are held, less than the %d that are not acknowledged take", l.Held, exact)
			}
			if acked == written {
				l.Settle(0)
				if l.Held != 0 {
					t.Fatalf("%d are held with everything acknowledged", l.Held)
				}
			}
			if l.N > len(l.Marks) {
				t.Fatalf("%d marks", l.N)
			}
		}
		l.Settle(0)
		if l.Held != 0 || l.N != 0 {
			t.Fatalf("%d are held by %d marks at the end", l.Held, l.N)
		}
	})
}

// A ledger of one-byte writes stays near the truth however long it runs.
func TestSendLedgerStaysNearTheTruth(t *testing.T) {
	var l tcpmem.SendLedger
	const ahead = 500
	for i := range 100_000 {
		l.Wrote(1)
		l.Settle(min(i+1, ahead))
	}
	exact := int64(ahead * (netstack.SegmentOverhead + netstack.LeastChunk))
	if l.Held < exact || l.Held > exact*3/2 {
		t.Errorf("%d are held for what takes %d", l.Held, exact)
	}
}

// FuzzCompact compares packets with their copies.
func FuzzCompact(f *testing.F) {
	f.Add(uint16(1), uint16(1), uint8(20))
	f.Add(uint16(2177), uint16(2048), uint8(0))
	f.Add(uint16(65535), uint16(8), uint8(60))
	f.Fuzz(func(t *testing.T, size, piece uint16, head uint8) {
		n := int(size)
		hl := min(int(head), n)
		want := make([]byte, n)
		for i := range want {
			want[i] = byte(i * 7)
		}
		var b buffer.Buffer
		for rest := want; len(rest) > 0; {
			k := min(max(int(piece), 8), len(rest))
			v := buffer.NewView(max(k, netstack.LeastChunk))
			_, _ = v.Write(rest[:k])
			if b.Size() == 0 {
				b = buffer.MakeWithView(v)
			} else {
				m := buffer.MakeWithView(v)
				b.Merge(&m) // keeps the views apart, as in a reassembled packet
			}
			rest = rest[k:]
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: b})
		defer pkt.DecRef()
		first := pkt.Data().Size()
		if v, _ := pkt.AsViewList(); v.Front() != nil {
			first = v.Front().Size()
		}
		netstack.Consume(pkt.NetworkHeader(), min(hl, first))
		pkt.RXChecksumValidated = true
		c := netstack.Compact(pkt)
		defer c.DecRef()
		if got := c.ToView().AsSlice(); !bytes.Equal(got, want) {
			t.Fatalf("the copy differs: %d bytes, %d before", len(got), len(want))
		}
		if len(c.NetworkHeader().Slice()) != len(pkt.NetworkHeader().Slice()) || c.Data().Size() != pkt.Data().Size() || !c.RXChecksumValidated {
			t.Fatal("the copy has other headers")
		}
		if netstack.Wasteful(c) {
			t.Fatalf("the copy of %d bytes takes %d", n, netstack.PacketCost(c))
		}
	})
}

// rawFlow is a flow of the sandbox's whose packets the test writes itself.
type rawFlow struct {
	w        *wire
	src, dst netip.AddrPort
	seq, ack uint32
	conn     *net.TCPConn // the far side's
}

func (w *wire) connectRaw(t *testing.T, port uint16) *rawFlow {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := &rawFlow{w: w, src: netip.AddrPortFrom(guest4, port), dst: netip.AddrPortFrom(gateway4, uint16(l.Addr().(*net.TCPAddr).Port)), seq: 1000}
	w.send(segment(r.src, r.dst, header.TCPFlagSyn, r.seq, 0))
	sa := w.recvTCP(port, header.TCPFlagSyn)
	r.seq++
	r.ack = sa.SequenceNumber() + 1
	w.send(segment(r.src, r.dst, header.TCPFlagAck, r.seq, r.ack))
	if r.conn, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.conn.Close() })
	return r
}

// data sends bytes that begin offset bytes after the stream's next one.
func (r *rawFlow) data(offset int, payload []byte) {
	p := segment(r.src, r.dst, header.TCPFlagAck|header.TCPFlagPsh, r.seq+uint32(offset), r.ack)
	p.l4 = append(p.l4, payload...)
	h := header.TCP(p.l4)
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(p.l4, packet.PseudoSum(p.src, p.dst, packet.ProtoTCP, len(p.l4))))
	r.w.send(p)
}

func (r *rawFlow) endpoint(t *testing.T) *tcp.Endpoint {
	t.Helper()
	var ep *tcp.Endpoint
	testutil.Eventually(t, "the flow is open", func() bool {
		r.w.f.tcp.Mu.Lock()
		defer r.w.f.tcp.Mu.Unlock()
		for id, fl := range r.w.f.tcp.Flows {
			if id.RemotePort == r.src.Port() && fl.Live.Load() {
				ep = fl.Ep.(*tcp.Endpoint)
			}
		}
		return ep != nil
	})
	return ep
}

// netstack's own fields, as we read them, agree with its other interfaces.
func TestStackFieldsAreTheOnesMeant(t *testing.T) {
	w := newWire(t, allowAll, nil)
	r := w.connectRaw(t, 20000)
	ep := r.endpoint(t)
	if next, ok := netstack.ReceiveNext(ep); !ok || next != r.seq {
		t.Errorf("the next sequence number is %d, not %d", next, r.seq)
	}
	r.data(100, make([]byte, 50)) // out of order, so that no reader takes it
	testutil.Eventually(t, "the segment is counted", func() bool { return netstack.ReceiveMemUsed(ep) > 50 })
	if n := netstack.ReceiveQueued(ep); n != 0 {
		t.Errorf("%d bytes can be read before the gap is filled", n)
	}
	if _, err := r.conn.Write(make([]byte, 700)); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "what is sent is counted until it is acknowledged", func() bool { return netstack.SendQueued(ep) == 700 })
	r.ack += 700
	r.data(0, make([]byte, 100))
	testutil.Eventually(t, "nothing is held", func() bool { return netstack.SendQueued(ep) == 0 && netstack.ReceiveMemUsed(ep) == 0 })
	if next, _ := netstack.ReceiveNext(ep); next != r.seq+150 {
		t.Errorf("the next sequence number is %d, not %d", next, r.seq+150)
	}
}

// Segments of one byte with gaps between them fill no more than a flow's share, even without
// pressure. Once the gaps are filled, the stream is whole.
func TestOutOfOrderBytesUnderPressure(t *testing.T) {
	for _, pressed := range []bool{false, true} {
		w := newWire(t, allowAll, func(c *Config) { c.MemoryMarks = admit.MarksBelow(16 << 20) })
		other := &admit.Charge{M: w.f.gate.Memory}
		if pressed {
			other.Try(15 << 20)
		}
		r := w.connectRaw(t, 20000)
		ep := r.endpoint(t)
		want := make([]byte, 4000)
		for i := range want {
			want[i] = byte(i)
		}
		for i := len(want) - 1; i > 0; i -= 2 {
			r.data(i, want[i:i+1])
		}
		bound := int64(2 * tcpmem.ReceiveStart)
		if pressed {
			bound = admit.FlowMinimum
		}
		if got := tcpmem.ReceivedCost(ep); got > bound {
			t.Errorf("pressed %v: %d bytes of memory are held for gaps, more than %d", pressed, got, bound)
		}
		// The sandbox's kernel resends what is not acknowledged.
		got := make(chan []byte)
		go func() {
			b := make([]byte, len(want))
			n, _ := io.ReadFull(r.conn, b)
			got <- b[:n]
		}()
		next := uint32(0)
		for next < uint32(len(want)) {
			r.data(int(next), want[next:min(next+100, uint32(len(want)))])
			testutil.Eventually(t, "the stream goes on", func() bool {
				n, _ := netstack.ReceiveNext(ep)
				if n-r.seq == next {
					r.data(int(next), want[next:min(next+100, uint32(len(want)))])
				}
				return n-r.seq > next
			})
			n, _ := netstack.ReceiveNext(ep)
			next = n - r.seq
		}
		if b := <-got; !bytes.Equal(b, want) {
			t.Errorf("pressed %v: %d bytes arrived, or others", pressed, len(b))
		}
		other.Release()
	}
}

// A far side sends byte by byte to a sandbox that acknowledges nothing. The queue takes little more
// than SmallReads, and everything arrives once there are acknowledgements.
func TestSingleBytesToASandboxThatDoesNotRead(t *testing.T) {
	w := newWire(t, allowAll, nil)
	r := w.connectRaw(t, 20000)
	ep := r.endpoint(t)
	_ = r.conn.SetNoDelay(true)
	const many = 3000
	for i := range many {
		if _, err := r.conn.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	testutil.Eventually(t, "bytes are sent", func() bool { return netstack.SendQueued(ep) > 0 })
	seen := uint32(0)
	for seen < many {
		if used := w.f.gate.Memory.Used.Load(); used > tcpmem.SmallReads+64<<10 {
			t.Fatalf("%d bytes of memory are held", used)
		}
		h := w.recvTCP(r.src.Port(), header.TCPFlagAck)
		data := h[h.DataOffset():]
		if at := h.SequenceNumber() - r.ack; len(data) > 0 && at == seen {
			for _, b := range data {
				if b != byte(seen) {
					t.Fatalf("byte %d is %d", seen, b)
				}
				seen++
			}
			w.send(segment(r.src, r.dst, header.TCPFlagAck, r.seq, r.ack+seen))
		}
	}
}

// A packet in many fragments is queued in chunks of its own size.
func TestAReassembledSegmentTakesItsSize(t *testing.T) {
	w := newWire(t, allowAll, nil)
	r := w.connectRaw(t, 20000)
	ep := r.endpoint(t)
	p := segment(r.src, r.dst, header.TCPFlagAck, r.seq+1, r.ack)
	p.l4 = append(p.l4, make([]byte, 4000)...)
	p.id = 77
	h := header.TCP(p.l4)
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(p.l4, packet.PseudoSum(p.src, p.dst, packet.ProtoTCP, len(p.l4))))
	w.sendFragments(p, 8)
	testutil.Eventually(t, "the segment is held", func() bool { return netstack.ReceiveMemUsed(ep) > 4000 })
	if w.f.Stats()["memory_compacted_packets"] == 0 {
		t.Error("the segment was queued as it came")
	}
}
