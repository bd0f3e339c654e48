package dns

// Life of a query: it is judged at once on the caller's goroutine, and answered there if possible.
// Otherwise it takes a slot of Limits.InFlight, and one goroutine carries it upstream and back. A
// datagram that finds no slot is answered SERVFAIL; a stream that finds none stops reading, which
// its peer feels as backpressure.

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"sluice.dev/sluice/forwarder/internal/seldom"
	"sluice.dev/sluice/policy"
)

// Dialer opens the sockets to upstream servers, each connected to exactly the given address.
// Upstreams are the host's own choice, so the implementation mints their verdicts; this package
// never sees one. The socket must not be bound to a port beforehand: the random port that the
// kernel picks for each is half the protection against forged answers.
type Dialer interface {
	Dial(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error)
}

// Limits bound a Resolver. Each zero field means its default.
type Limits struct {
	InFlight    int           // forwarded queries in flight, over all transports; 1024
	UpstreamTCP int           // answers fetched over TCP (up to 64 KiB each) and not yet delivered; 64
	Streams     int           // TCP connections from the sandbox; 64
	Pipeline    int           // queries in flight on one of them; 32
	StreamIdle  time.Duration // for the next query to arrive, or an answer to be taken; 10 s
	QueryTime   time.Duration // for one query, over all tries; 20 s
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.InFlight, 1024)
	def(&l.UpstreamTCP, 64)
	def(&l.Streams, 64)
	def(&l.Pipeline, 32)
	if l.StreamIdle <= 0 {
		l.StreamIdle = 10 * time.Second
	}
	if l.QueryTime <= 0 {
		l.QueryTime = 20 * time.Second
	}
	return l
}

// Config is what a Resolver needs. Without Dialer nothing is forwarded.
type Config struct {
	Dialer    Dialer
	Upstreams Upstreams               // to begin with; SetUpstreams changes them
	Hosts     map[string][]netip.Addr // --add-host
	Limits    Limits
	Log       *slog.Logger // nil discards

	// Rules returns the rules in force; nil means that there are none yet and every name is
	// refused. If Rules itself is nil, no policy gates names (gate.go). Addresses of allowed names
	// are granted in Names, which must be set if Rules is.
	Rules func() *policy.Rules
	Names Names
	// OnlyGated says that the sandbox has a resolver of its own. This one answers in its place
	// while the policy gates names, and is silent otherwise.
	OnlyGated bool
	// Tell is called with each question that the gate decided. It must not block. It may be nil.
	Tell func(Event)
}

// Names is where addresses are granted: a policy.Names, or a wrapper of one.
type Names interface {
	Grant(name string, addrs []netip.Addr, ttl time.Duration, now time.Time) error
}

// Resolver answers the sandbox's questions. All methods may be called from any
// goroutine.
type Resolver struct {
	dialer Dialer
	local  *localNames
	limits Limits
	log    *slog.Logger
	stats  counters

	failures seldom.Failures // tries at servers that gave no answer

	rules   func() *policy.Rules // nil: no policy gates names
	names   Names
	only    bool // Config.OnlyGated
	tell    func(Event)
	tunnels tunnels
	rate    bucket
	flights singleflight.Group // the gate's questions on their way upstream
	cache   cache

	set      atomic.Pointer[serverSet]
	inFlight chan struct{} // a token per forwarded query
	large    chan struct{} // a token per answer fetched over TCP
	streams  chan struct{} // a token per connection

	ctx    context.Context // ends at Close
	cancel context.CancelFunc

	mu     sync.Mutex // guards closed, and setting set
	closed bool
	work   sync.WaitGroup // added to under mu while not closed
}

// New makes a Resolver. It fails only if a host name is not a valid name.
func New(cfg Config) (*Resolver, error) {
	local, err := newLocalNames(cfg.Hosts)
	if err != nil {
		return nil, fmt.Errorf("reading local names: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	limits := cfg.Limits.withDefaults()
	r := &Resolver{
		dialer:   cfg.Dialer,
		local:    local,
		limits:   limits,
		log:      cfg.Log,
		rules:    cfg.Rules,
		names:    cfg.Names,
		only:     cfg.OnlyGated,
		tell:     cfg.Tell,
		inFlight: make(chan struct{}, limits.InFlight),
		large:    make(chan struct{}, limits.UpstreamTCP),
		streams:  make(chan struct{}, limits.Streams),
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.SetUpstreams(cfg.Upstreams)
	return r, nil
}

// SetUpstreams replaces the upstream servers. Queries in flight use the new ones from their next
// round on.
func (r *Resolver) SetUpstreams(u Upstreams) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.set.Load()
	if old != nil && old.up.Equal(u) {
		return
	}
	r.set.Store(newServerSet(u))
	r.cache.flush()
	if r.only {
		return // whether servers are needed depends on the policy: the caller that sets it says so
	}
	// Logged once per change of state, not once per query.
	switch had := old == nil || len(old.up.Servers) > 0; {
	case had && len(u.Servers) == 0:
		r.log.Warn("no upstream DNS server: names cannot be resolved in the sandbox until the host's resolv.conf has a nameserver line, or the sandbox is started with --dns")
	case !had && len(u.Servers) > 0:
		r.log.Info("upstream DNS servers are back", "servers", u.Servers)
	}
}

// begin registers one unit of work, which Close waits for; work.Done ends it.
func (r *Resolver) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.work.Add(1)
	return true
}

// ServePacket answers one datagram. It does not block, and keeps no reference to msg. send is
// called at most once, on this or another goroutine, and never after Close has returned. It is
// called with nil if a refused question gets no answer.
func (r *Resolver) ServePacket(ctx context.Context, msg []byte, from netip.AddrPort, send func([]byte, policy.Outcome)) {
	if !r.begin() {
		return
	}
	v := r.judge(msg, from, false)
	if v.forward == nil {
		defer r.work.Done()
		if v.became != policy.OutcomeNone {
			send(v.answer, v.became)
		}
		return
	}
	select {
	case r.inFlight <- struct{}{}:
	default:
		defer r.work.Done()
		send(r.busy(v.forward))
		return
	}
	// Owned by Close; stopped by ctx, Close, or Limits.QueryTime.
	go func() {
		defer r.work.Done()
		defer func() { <-r.inFlight }()
		a := r.forward(ctx, v.forward)
		defer a.release()
		send(a.msg, a.became)
	}()
}

// busy answers a question that found no free slot.
func (r *Resolver) busy(qy *query) ([]byte, policy.Outcome) {
	if qy.gated == nil {
		r.stats.OverLimit.Add(1)
		return qy.fail(qy.asked, rcodeServFail), policy.OutcomeRefused
	}
	return r.refuse(qy, qy.gated.name, refuseBusy, ruleBusy, &r.stats.OverLimit).answer, policy.OutcomeRefused
}

// AnswerPacket answers one datagram from the cache, at once, or returns nil; the datagram then goes
// to ServePacket. It keeps no reference to msg.
func (r *Resolver) AnswerPacket(msg []byte, from netip.AddrPort) []byte {
	rules, gates := r.inForce()
	if !gates || len(msg) < headerLen || be16(msg, 2)&bitQR != 0 {
		return nil
	}
	qy, code := parseQuery(msg)
	if code != rcodeSuccess || qy.fault != rcodeSuccess {
		return nil
	}
	qy.from, qy.asked = from, msg
	out := r.fromCache(rules, &qy)
	if out != nil {
		r.stats.Queries.Add(1)
	}
	return out
}

// Close stops all work and returns after the last goroutine.
func (r *Resolver) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.work.Wait()
}
