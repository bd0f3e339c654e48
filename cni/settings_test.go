package cni

import (
	"path"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"sluice.dev/sluice/cni/uplink"
	"sluice.dev/sluice/internal/testutil"
)

// TestWhatTuningSetStays sets what the plugin tuning may before ours is called.
func TestWhatTuningSetStays(t *testing.T) {
	chosen := map[string]string{
		"ipv4/conf/arp_ignore": "1", "ipv4/conf/rp_filter": "2", "ipv4/neigh/gc_stale_time": "123",
		"ipv6/conf/hop_limit": "33", "ipv6/neigh/ucast_solicit": "7",
	}
	n := newNode(t)
	n.ip("link", "set", "eth0", "promisc", "on")
	n.ip("link", "set", "eth0", "allmulticast", "on")
	testutil.Must(t, n.pod.Do(func(ns.NetNS) error {
		for key, value := range chosen {
			tree, setting := path.Split(key)
			if err := uplink.WriteSysctl(tree+"eth0/"+setting, value); err != nil {
				return err
			}
		}
		return nil
	}))
	before := n.inside()
	if !before.Promisc || !before.Allmulti {
		t.Fatalf("the flags are not set: %s", asJSON(before))
	}
	kept := func(when string) {
		t.Helper()
		if now := n.inside(); !now.Promisc || !now.Allmulti {
			t.Errorf("%s: promiscuous %v, all multicast %v", when, now.Promisc, now.Allmulti)
		}
		got, err := uplink.ReadSettings(n.pod, "eth0")
		testutil.Must(t, err)
		for key, want := range chosen {
			if got[key] != want {
				t.Errorf("%s: %s is %q, not %s", when, key, got[key], want)
			}
		}
	}
	kept("before ADD")
	testutil.Must(t, n.add())
	kept("after ADD")
	endProcess(n.procs.pid(n.name()))
	testutil.Must(t, n.status())
	kept("after a repair")
	testutil.Must(t, n.del())
	kept("after DEL")
	n.unchanged(before)
	n.clean()
}

// TestNoSettingIsMadeUp has an interface of which nobody chose anything.
func TestNoSettingIsMadeUp(t *testing.T) {
	n := newNode(t)
	if got, err := uplink.ReadSettings(n.pod, "eth0"); err != nil || len(got) > 0 {
		t.Errorf("settings that nobody chose: %v (%v)", got, err)
	}
}
