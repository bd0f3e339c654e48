package tun

import "golang.org/x/sys/unix"

// Several queues let several readers take frames at once, which makes bulk data in several flows a
// quarter faster. Everything else is better off with one: with two attached, the kernel dissects
// and remembers every flow, and one batch becomes two, which made short connections a fifth slower.
// So the others are detached (TUNSETQUEUE) until Spread.
//
//	Create ─► one ─ Spread ─► all ─ Narrow ─► all, written to one ─ Gather ─► one
//
// The kernel sends a flow's packets to the queue that the flow's last packet to the sandbox came
// from, so after Narrow live flows return to the first queue by themselves. New flows go to any
// queue, and frames in a queue that is detached are lost: call Gather when no frames arrive. A
// detached queue has nothing to read, but still accepts writes.

// setQueue attaches or detaches a queue: IFF_ATTACH_QUEUE or IFF_DETACH_QUEUE.
func setQueue(fd int, flag uint16) error {
	req, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	req.SetUint16(flag)
	return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, req)
}

// Queues returns how many of the device's queues are attached, and how many it has.
func (e *Endpoint) Queues() (attached, all int) {
	for _, q := range e.queues {
		if q.attached.Load() {
			attached++
		}
	}
	return attached, len(e.queues)
}

// Received returns how many frames the device delivered, without the dropped ones.
func (e *Endpoint) Received() (frames uint64) {
	for _, q := range e.queues {
		frames += q.count.rxFrames.Load()
	}
	return frames
}

// Spread uses all of the device's queues. Calls of Spread, Narrow and Gather must not overlap.
func (e *Endpoint) Spread() error {
	for _, q := range e.queues {
		if err := q.attach(true); err != nil {
			return err
		}
	}
	e.written.Store(uint32(len(e.queues)))
	return nil
}

// Narrow writes to the first queue only, so that the others become idle.
func (e *Endpoint) Narrow() { e.written.Store(1) }

// Gather uses only the first queue.
func (e *Endpoint) Gather() error {
	e.Narrow()
	for _, q := range e.queues[1:] {
		if err := q.attach(false); err != nil {
			return err
		}
		// Not under fdMu: a delivering reader may write, which takes fdMu.
		q.reading.Lock()
		q.rx.release()
		q.reading.Unlock()
	}
	return nil
}

// attach makes the kernel send to the queue, or stop sending.
func (q *queue) attach(on bool) error {
	flag := uint16(unix.IFF_DETACH_QUEUE)
	if on {
		flag = unix.IFF_ATTACH_QUEUE
	}
	q.fdMu.RLock()
	defer q.fdMu.RUnlock()
	switch {
	case q.fd < 0 || q.e.closing.Load():
		return ErrClosed
	case q.attached.Load() == on:
		return nil
	}
	if err := setQueue(q.fd, flag); err != nil {
		return err
	}
	q.attached.Store(on)
	return nil
}
