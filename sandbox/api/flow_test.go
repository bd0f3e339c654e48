package api

import (
	"encoding/json"
	"io"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"sluice.dev/sluice/nat"
)

func TestRecordIsTheFlowThatConntrackPrints(t *testing.T) {
	from, to := netip.MustParseAddr("10.0.2.100"), netip.MustParseAddr("192.0.2.1")
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, row := range []struct {
		l4         L4
		orig       nat.Tuple
		backSrc    uint16
		backDst    uint16
		state      nat.State
		timeToLive float64
	}{
		{L4{TCP: &Ports{4000, 443}}, nat.NewTuple(6, netip.AddrPortFrom(from, 4000), netip.AddrPortFrom(to, 443)), 443, 5000, nat.Established, 432000},
		{L4{UDP: &Ports{4000, 53}}, nat.NewTuple(17, netip.AddrPortFrom(from, 4000), netip.AddrPortFrom(to, 53)), 53, 5000, nat.Unreplied, 30},
		{L4{SCTP: &Ports{4000, 9}}, nat.NewTuple(132, netip.AddrPortFrom(from, 4000), netip.AddrPortFrom(to, 9)), 9, 4000, nat.Unreplied, 1},
		{L4{ICMPv4: &ICMP{Type: 8, Code: 3, ID: 77}}, nat.NewTuple(1, netip.AddrPortFrom(from, 77), netip.AddrPortFrom(to, 8<<8|3)), 77, 3, nat.Replied, 0},
		{L4{Other: 47}, nat.NewTuple(47, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0)), 0, 0, nat.Unreplied, 600},
	} {
		r := FlowRecord{
			ID: 7, IP: IP{Source: from, Destination: to}, L4: row.l4, State: row.state.String(), TrafficDirection: Ingress, Start: began,
			Orig: Counter{2, 120}, Reply: Counter{1, 60}, Rule: "egress[0] web", DestinationNames: []string{"example.org"}, Reason: "closed",
			ReplySource: netip.AddrPortFrom(to, row.backSrc), ReplyDestination: netip.AddrPortFrom(from, row.backDst),
			Conntrack: &Conntrack{Replied: true, Assured: true, Timeout: row.timeToLive, LastSeen: began.Add(time.Second)},
		}
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back FlowRecord
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
		got, err := back.Flow()
		want := nat.Flow{
			ID: 7, State: row.state, Orig: row.orig, Reply: nat.NewTuple(row.orig.Proto(), r.ReplySource, r.ReplyDestination),
			OrigPackets: 2, OrigBytes: 120, ReplyPackets: 1, ReplyBytes: 60, SeenReply: true, Assured: true, TimeoutLeft: time.Duration(row.timeToLive * 1e9),
			Start: began, LastSeen: began.Add(time.Second), Ingress: true, Rule: "egress[0] web", Names: []string{"example.org"}, Reason: "closed",
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s\nis %+v, %v\nwant %+v", data, got, err, want)
		}
	}
	if _, err := (&FlowRecord{State: "NONE"}).Flow(); err == nil {
		t.Error("a record without addresses is taken for a flow")
	}
	a := netip.AddrPortFrom(to, 1)
	if _, err := (&FlowRecord{State: "DREAMING", IP: IP{Source: from, Destination: to}, ReplySource: a, ReplyDestination: a}).Flow(); err == nil {
		t.Error("a state that conntrack does not have is taken")
	}
}

// FuzzFlowRecord: a worker's answer is data from the less trusted side.
func FuzzFlowRecord(f *testing.F) {
	f.Add([]byte(`{"IP":{"source":"10.0.2.100","destination":"192.0.2.1"},"l4":{"TCP":{"source_port":1,"destination_port":2}},"state":"ESTABLISHED","reply_source":"[::1]:1","reply_destination":"[fe80::1%a]:2","conntrack":{"timeout_seconds":1e300}}`))
	f.Add([]byte(`{"IP":{"source":"::","destination":"::ffff:1.2.3.4"},"l4":{"ICMPv6":{"type":128,"id":7}},"state":"UNREPLIED","reply_source":"1.2.3.4:0","reply_destination":"1.2.3.4:0"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r FlowRecord
		if json.Unmarshal(data, &r) != nil {
			return
		}
		r.Source()
		r.Destination()
		flow, err := r.Flow()
		if err != nil {
			return
		}
		_ = nat.WriteConntrack(io.Discard, []nat.Flow{flow}, nat.ConntrackOptions{ID: true})
	})
}
