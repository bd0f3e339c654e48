package nat

// The text of conntrack(8), as conntrack-tools 1.4.7 prints it (libnetfilter_conntrack's
// snprintf_default.c). One line per flow:
//
//	tcp      6 431999 ESTABLISHED src=… dst=… sport=… dport=… packets=… bytes=… \
//	    [UNREPLIED] src=… dst=… sport=… dport=… packets=… bytes=… [ASSURED] mark=0 use=1
//
// Scripts depend on these details of the kernel's format, so they are kept: the protocol name is
// padded to eight columns; only TCP has a state word; [UNREPLIED] stands between the directions;
// listed flows have a mark and a use count, events have neither; only listed flows and DESTROY have
// counters; the DESTROY of a flow that timed out has no timeout.

import (
	"bufio"
	"io"
	"strconv"
	"time"
)

// ConntrackOptions choose what conntrack(8) prints. The zero value is what it prints
// where nf_conntrack_acct is on.
type ConntrackOptions struct {
	NoCounters bool // as with nf_conntrack_acct=0
	Extended   bool // -o extended: the family first
	ID         bool // -o id
	Timestamp  bool // -o timestamp: events begin with the time
}

// WriteConntrack writes the flows as `conntrack -L` lists them.
func WriteConntrack(w io.Writer, flows []Flow, opt ConntrackOptions) error {
	b := bufio.NewWriter(w)
	var line []byte
	for i := range flows {
		line = appendFlow(line[:0], &flows[i], opt, listing)
		if _, err := b.Write(line); err != nil {
			return err
		}
	}
	return b.Flush()
}

// WriteConntrackEvent writes one event as `conntrack -E` shows it.
func WriteConntrackEvent(w io.Writer, ev Event, opt ConntrackOptions) error {
	var line []byte
	if opt.Timestamp {
		line = append(line, '[')
		line = strconv.AppendInt(line, ev.Time.Unix(), 10)
		line = append(line, '.')
		line = appendZeros(line, int64(ev.Time.Nanosecond()/1000), 6)
		line = append(line, "]\t"...)
	}
	switch ev.Type {
	case New:
		line = append(line, "    [NEW] "...)
	case Update:
		line = append(line, " [UPDATE] "...)
	default:
		line = append(line, "[DESTROY] "...)
	}
	_, err := w.Write(appendFlow(line, &ev.Flow, opt, lineKind(ev.Type)))
	return err
}

// lineKind is an EventType or listing.
type lineKind uint8

const listing lineKind = 255

func appendFlow(b []byte, f *Flow, opt ConntrackOptions, kind lineKind) []byte {
	if opt.Extended {
		if f.Orig.family == familyIPv4 {
			b = append(b, "ipv4     2 "...)
		} else {
			b = append(b, "ipv6     10 "...)
		}
	}
	name := protoName(f.Orig.proto)
	b = append(b, name...)
	for i := len(name); i < 8; i++ {
		b = append(b, ' ')
	}
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(f.Orig.proto), 10)
	b = append(b, ' ')
	if f.TimeoutLeft > 0 || kind != lineKind(Destroy) {
		b = strconv.AppendInt(b, int64(f.TimeoutLeft/time.Second), 10)
		b = append(b, ' ')
	}
	if f.Orig.proto == protoTCP {
		b = append(b, f.State.String()...)
		b = append(b, ' ')
	}
	counters := !opt.NoCounters && (kind == listing || kind == lineKind(Destroy))
	b = appendHalf(b, f.Orig, f.OrigPackets, f.OrigBytes, counters)
	if !f.SeenReply {
		b = append(b, "[UNREPLIED] "...)
	}
	b = appendHalf(b, f.Reply, f.ReplyPackets, f.ReplyBytes, counters)
	if f.Assured {
		b = append(b, "[ASSURED] "...)
	}
	if kind == listing {
		b = append(b, "mark=0 use=1 "...)
	}
	if opt.ID {
		b = append(b, "id="...)
		b = strconv.AppendUint(b, uint64(uint32(f.ID)), 10)
		b = append(b, ' ')
	}
	b[len(b)-1] = '\n'
	return b
}

func appendHalf(b []byte, t Tuple, packets, bytes int64, counters bool) []byte {
	b = append(b, "src="...)
	b = t.addr(t.src).AppendTo(b)
	b = append(b, " dst="...)
	b = t.addr(t.dst).AppendTo(b)
	b = append(b, ' ')
	switch {
	case t.isICMP():
		b = appendField(b, "type=", int64(t.dport>>8))
		b = appendField(b, "code=", int64(t.dport&0xff))
		b = appendField(b, "id=", int64(t.sport))
	case t.proto == protoTCP || t.proto == protoUDP:
		b = appendField(b, "sport=", int64(t.sport))
		b = appendField(b, "dport=", int64(t.dport))
	}
	if counters {
		b = appendField(b, "packets=", packets)
		b = appendField(b, "bytes=", bytes)
	}
	return b
}

func appendField(b []byte, key string, v int64) []byte {
	b = append(b, key...)
	b = strconv.AppendInt(b, v, 10)
	return append(b, ' ')
}

func appendZeros(b []byte, v int64, width int) []byte {
	s := strconv.FormatInt(v, 10)
	for i := len(s); i < width; i++ {
		b = append(b, '0')
	}
	return append(b, s...)
}
