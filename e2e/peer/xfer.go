package main

// Checked bulk transfers: each stream carries its own bytes (a block common to all, headed by the
// stream's number), followed by their SHA-256. The receiver compares that with its own sum and
// answers with one byte. A stream fails if it gets another's bytes or if a byte is lost, doubled or
// changed.
//
//	client → server: 'u' or 'd', stream number (4 bytes), length (8 bytes)
//	sender → receiver: the bytes, their SHA-256
//	receiver → sender: 'y' or 'n'
//
// The sender's sums are computed before the clock starts, so that on a machine with two cores only
// one side's hashing counts.

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

const xferBlock = 1 << 20

var (
	xferData = sync.OnceValue(func() []byte {
		b := make([]byte, xferBlock)
		rng := rand.New(rand.NewPCG(1, 2))
		for i := 0; i < len(b); i += 8 {
			binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
		}
		return b
	})
	xferSums sync.Map // of xferKey: [32]byte
)

type xferKey struct {
	stream uint32
	size   uint64
}

// pieces yields the stream's bytes in order.
func (k xferKey) pieces(f func([]byte) error) error {
	head := make([]byte, 64)
	block := xferData()
	left := k.size
	for n := uint64(0); left > 0; n++ {
		// Every piece starts with its position, so that pieces out of order are noticed too.
		binary.BigEndian.PutUint32(head, k.stream)
		binary.BigEndian.PutUint64(head[8:], n)
		for _, p := range [][]byte{head, block[:xferBlock-64]} {
			p = p[:min(uint64(len(p)), left)]
			if err := f(p); err != nil {
				return err
			}
			left -= uint64(len(p))
		}
	}
	return nil
}

func (k xferKey) sum() [32]byte {
	if s, ok := xferSums.Load(k); ok {
		return s.([32]byte)
	}
	h := sha256.New()
	k.pieces(func(p []byte) error { h.Write(p); return nil })
	s := [32]byte(h.Sum(nil))
	xferSums.Store(k, s)
	return s
}

func (k xferKey) send(c net.Conn) error {
	if err := k.pieces(func(p []byte) error { _, err := c.Write(p); return err }); err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	sum := k.sum()
	if _, err := c.Write(sum[:]); err != nil {
		return fmt.Errorf("sending the sum: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return fmt.Errorf("reading the verdict: %w", err)
	}
	if answer[0] != 'y' {
		return errors.New("the receiver got other bytes")
	}
	return nil
}

func (k xferKey) receive(c net.Conn) error {
	h := sha256.New()
	buf := make([]byte, 256<<10)
	if n, err := io.CopyBuffer(h, struct{ io.Reader }{io.LimitReader(c, int64(k.size))}, buf); err != nil || uint64(n) != k.size {
		return fmt.Errorf("%d of %d bytes received: %w", n, k.size, errors.Join(err, io.ErrUnexpectedEOF))
	}
	var told [32]byte
	if _, err := io.ReadFull(c, told[:]); err != nil {
		return fmt.Errorf("reading the sum: %w", err)
	}
	if want := k.sum(); !bytes.Equal(told[:], h.Sum(nil)) || told != want {
		c.Write([]byte{'n'})
		return errors.New("other bytes received than were sent")
	}
	if _, err := c.Write([]byte{'y'}); err != nil {
		return err
	}
	return nil
}

func xferServe(c *net.TCPConn) {
	defer c.Close()
	var head [13]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	k := xferKey{binary.BigEndian.Uint32(head[1:]), binary.BigEndian.Uint64(head[5:])}
	if head[0] == 'u' {
		k.receive(c)
	} else {
		k.send(c)
	}
}

type xferResult struct {
	OK      int            `json:"ok"`
	Failed  map[string]int `json:"failed,omitempty"`
	Bytes   uint64         `json:"bytes"`
	Seconds float64        `json:"seconds"`
	Gbps    float64        `json:"gbit_per_s"`
}

func xfer(args []string) error {
	fs := flag.NewFlagSet("xfer", flag.ExitOnError)
	streams := fs.Int("streams", 64, "connections, all at once")
	size := fs.Uint64("size", 16<<20, "bytes in each")
	dir := fs.String("dir", "up", "up or down")
	timeout := fs.Duration("timeout", time.Minute, "for the whole")
	if err := fs.Parse(args); err != nil {
		return err
	}
	for i := range *streams {
		xferKey{uint32(i), *size}.sum()
	}
	r := xferResult{Failed: map[string]int{}}
	var mu sync.Mutex
	var all sync.WaitGroup
	start := time.Now()
	for i := range *streams {
		all.Go(func() {
			err := xferOne(fs.Arg(0), xferKey{uint32(i), *size}, *dir, start.Add(*timeout))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				r.Failed[err.Error()]++
				return
			}
			r.OK++
			r.Bytes += *size
		})
	}
	all.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.Gbps = float64(r.Bytes) * 8 / 1e9 / r.Seconds
	say(r)
	return nil
}

func xferOne(addr string, k xferKey, dir string, deadline time.Time) error {
	c, err := net.DialTimeout("tcp", addr, time.Until(deadline))
	if err != nil {
		return fmt.Errorf("connecting: %s", errorName(err))
	}
	defer c.Close()
	c.SetDeadline(deadline)
	var head [13]byte
	head[0] = dir[0]
	binary.BigEndian.PutUint32(head[1:], k.stream)
	binary.BigEndian.PutUint64(head[5:], k.size)
	if _, err := c.Write(head[:]); err != nil {
		return err
	}
	if dir == "up" {
		err = k.send(c)
	} else {
		err = k.receive(c)
	}
	return err
}
