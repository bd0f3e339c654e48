package e2e

// Many pods at once.

import (
	"strings"
	"sync"
	"testing"
	"time"
)

func TestCNIManyPods(t *testing.T) {
	cniArea(t, "cni.many")
	const count = 50
	for _, alone := range []bool{false, true} {
		t.Run(map[bool]string{false: "chained", true: "delegating"}[alone], func(t *testing.T) {
			n := newNode(t)
			serve(t, n.far)
			list := n.conflist(t, network{version: "1.0.0", main: "ptp", subnets: dual, alone: alone})
			pods := make([]*pod, count)
			for i := range pods {
				pods[i] = n.newPod(t, list)
			}
			// As many run at once as from a kubelet on a busy node.
			each := func(verb string, f func(*pod) error) {
				t.Helper()
				begun := time.Now()
				var wg sync.WaitGroup
				places := make(chan struct{}, 16)
				for _, p := range pods {
					wg.Go(func() {
						places <- struct{}{}
						defer func() { <-places }()
						if err := f(p); err != nil {
							t.Errorf("%s of %s: %v", verb, p.id, err)
						}
					})
				}
				wg.Wait()
				t.Logf("%s of %d pods took %v", verb, count, time.Since(begun).Round(time.Millisecond))
			}
			each("ADD", (*pod).tryAdd)
			if t.Failed() {
				each("DEL", (*pod).del)
				return
			}
			for i := 0; i < count; i += 10 {
				p := pods[i]
				if d, r := dial(t, p, at(far4, portWhoami)); !strings.HasPrefix(d.Got, p.addr(false)+":") {
					t.Errorf("the pod %s is seen as %q\n%s", p.addr(false), d.Got, r)
				}
			}
			seen := map[string]bool{}
			for i, p := range pods {
				for _, a := range p.addrs() {
					if seen[a] {
						t.Errorf("two pods have %s", a)
					}
					seen[a] = true
				}
				if i%2 == 0 {
					p.close(t) // half of the containers have gone before DEL
				}
			}
			each("DEL", (*pod).del)
			for _, p := range pods {
				p.close(t)
			}
			n.clean(t)
		})
	}
}
