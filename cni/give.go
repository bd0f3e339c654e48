package cni

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"

	"sluice.dev/sluice/cni/uplink"
)

// giving is the main interface on its way back from the uplink namespace to the pod. It takes two
// steps, because our device has its name while the monitor lives: first it is moved, down and under
// a temporary name; then, with the monitor gone, it gets its name, addresses and routes. A DEL that
// was killed in between resumes there. A nil giving has nothing to do.
type giving struct {
	uplink, pod ns.NetNS
	ifName      string
	state       *uplink.LinkState // nil: what it has in the uplink namespace
}

// newGiving returns nil if the pod's namespace is gone or now belongs to another pod.
func newGiving(uplinkNS ns.NetNS, podPath, podID, ifName string, a *Attachment) (*giving, error) {
	pod, err := uplink.OpenNetns(podPath)
	if err != nil || pod == nil {
		return nil, err
	}
	id, err := uplink.NetnsID(podPath)
	if err != nil || podID != "" && id != podID {
		return nil, errors.Join(err, pod.Close())
	}
	g := &giving{uplink: uplinkNS, pod: pod, ifName: ifName}
	if a != nil {
		g.state = a.Link
	}
	return g, nil
}

// close releases the pod's namespace.
func (g *giving) close() {
	if g != nil {
		_ = g.pod.Close()
	}
}

// onTheWay is the interface's temporary name between the steps.
func (g *giving) onTheWay() string {
	sum := sha256.Sum256([]byte(g.ifName))
	return "sluice" + hex.EncodeToString(sum[:])[:8]
}

// take moves the interface out of the uplink namespace. It is no error if it is not there.
func (g *giving) take() error {
	if g == nil {
		return nil
	}
	h, err := uplink.Handle(g.uplink)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := uplink.FindLink(h, g.ifName)
	if err != nil || link == nil {
		return err
	}
	if g.state == nil {
		if _, g.state, err = uplink.ReadLink(h, g.ifName); err != nil {
			return err
		}
	}
	// An interface of that name beside ours is not ours.
	if err = g.evict(g.onTheWay()); err == nil {
		err = uplink.MoveLink(g.uplink, link, g.pod, g.onTheWay())
	}
	if err != nil {
		return fmt.Errorf("give the pod its interface back: %w", err)
	}
	return nil
}

// evict takes a name from one of the pod's own interfaces: root in the pod can give any interface
// any name.
func (g *giving) evict(name string) error {
	h, err := uplink.Handle(g.pod)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := uplink.FindLink(h, name)
	if err != nil || link == nil {
		return err
	}
	if link.Attrs().Name != name {
		err = h.LinkDelAltName(link, name)
	} else if h.LinkDel(link) != nil {
		// The loopback interface cannot be deleted, and some interfaces cannot be renamed while up.
		err = errors.Join(h.LinkSetDown(link), h.LinkSetName(link, fmt.Sprintf("evicted%08x", rand.Uint32())))
	}
	if err != nil {
		return fmt.Errorf("free the name %s: %w", name, err)
	}
	return nil
}

// give restores the interface as it was before ADD, and removes the remains of our device.
func (g *giving) give() error {
	if g == nil {
		return nil
	}
	h, err := uplink.Handle(g.pod)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := uplink.FindLink(h, g.onTheWay())
	if err != nil || link == nil {
		return err
	}
	if err := g.clearName(h); err != nil {
		return err
	}
	if err := h.LinkSetName(link, g.ifName); err != nil {
		return fmt.Errorf("give the pod its interface back: rename it to %s: %w", g.ifName, err)
	}
	link, err = h.LinkByName(g.ifName)
	if err != nil {
		return fmt.Errorf("find %s after giving it back: %w", g.ifName, err)
	}
	if g.state == nil {
		return nil // killed in between, without a record: its former state is unknown
	}
	if err := errors.Join(g.state.ApplySettings(g.pod, h, link), g.state.Apply(h, link, true)); err != nil {
		return fmt.Errorf("give the pod its interface back: %w", err)
	}
	return nil
}

// clearName takes the name from our device. The kernel takes some 20 ms to end a device, and only
// its name is worth waiting for. Kernels before 6.2 cannot rename a device that is up, so there we
// wait.
func (g *giving) clearName(h *netlink.Handle) error {
	link, err := uplink.FindLink(h, g.ifName)
	switch {
	case err != nil || link == nil:
		return err
	case !uplink.IsDevice(link) || link.Attrs().Name != g.ifName:
		return g.evict(g.ifName)
	}
	if h.LinkSetName(link, g.ending()) == nil {
		return nil
	}
	return uplink.RemoveDevice(h, g.ifName)
}

// ending is our device's name while it ends.
func (g *giving) ending() string { return "end" + g.onTheWay()[len("end"):] }
