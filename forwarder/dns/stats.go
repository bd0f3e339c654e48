package dns

import (
	"sync/atomic"
)

// counters holds a Resolver's counters; Stats is their snapshot.
type counters struct {
	Queries, Local, Malformed, FormErr, NotImp, BadVers, Refused  atomic.Uint64
	Forwarded, ServFail, OverLimit, Truncated                     atomic.Uint64
	UpstreamTries, UpstreamFailures, UpstreamIgnored, UpstreamTCP atomic.Uint64
	Streams, StreamsRefused, StreamsIdle                          atomic.Uint64
	RefusedName, RefusedType, RefusedTunnel, OverRate             atomic.Uint64
	UpstreamFolded, AnswersRefused, RecordsForeign                atomic.Uint64
	RecordsRebound, GrantsRefused, Ungated, Cached                atomic.Uint64
}

// Stats are totals since New.
type Stats struct {
	Queries   uint64 `json:"queries"`   // messages from the sandbox
	Local     uint64 `json:"local"`     // answered from --add-host and the special names
	Forwarded uint64 `json:"forwarded"` // answered by an upstream
	ServFail  uint64 `json:"servfail"`  // no upstream answered
	OverLimit uint64 `json:"overLimit"` // SERVFAIL because too many were in flight
	Malformed uint64 `json:"malformed"` // not a query at all, not answered
	FormErr   uint64 `json:"formerr"`
	NotImp    uint64 `json:"notimp"`
	BadVers   uint64 `json:"badvers"` // of an EDNS version that does not exist
	Refused   uint64 `json:"refused"`
	Truncated uint64 `json:"truncated"` // answers cut to the client's size

	UpstreamTries    uint64 `json:"upstreamTries"`
	UpstreamFailures uint64 `json:"upstreamFailures"` // timeouts, socket errors, malformed answers
	UpstreamIgnored  uint64 `json:"upstreamIgnored"`  // datagrams that answered another question
	UpstreamTCP      uint64 `json:"upstreamTCP"`      // tries over TCP

	Streams        uint64 `json:"streams"`
	StreamsRefused uint64 `json:"streamsRefused"` // over the limit
	StreamsIdle    uint64 `json:"streamsIdle"`    // closed for idleness

	OverRate uint64 `json:"overRate"` // REFUSED because questions came too fast
	Ungated  uint64 `json:"ungated"`  // not answered: the policy had just left names to others

	// While the policy gates names.
	Cached         uint64 `json:"cached"`         // answered from the cache
	RefusedName    uint64 `json:"refusedName"`    // no rule lets it be asked
	RefusedType    uint64 `json:"refusedType"`    // the policy does not list it
	RefusedTunnel  uint64 `json:"refusedTunnel"`  // the bounds against tunnels
	UpstreamFolded uint64 `json:"upstreamFolded"` // asked again: the question came back in another case
	AnswersRefused uint64 `json:"answersRefused"` // could not be read to their end
	RecordsForeign uint64 `json:"recordsForeign"` // left out of answers: nobody asked for them
	RecordsRebound uint64 `json:"recordsRebound"` // left out of answers: addresses that no rule may open
	GrantsRefused  uint64 `json:"grantsRefused"`  // too many names or addresses
}

// Stats returns the current counters.
func (r *Resolver) Stats() Stats {
	c := &r.stats
	return Stats{
		Queries: c.Queries.Load(), Local: c.Local.Load(), Forwarded: c.Forwarded.Load(),
		ServFail: c.ServFail.Load(), OverLimit: c.OverLimit.Load(), Malformed: c.Malformed.Load(),
		FormErr: c.FormErr.Load(), NotImp: c.NotImp.Load(), BadVers: c.BadVers.Load(), Refused: c.Refused.Load(), Truncated: c.Truncated.Load(),
		UpstreamTries: c.UpstreamTries.Load(), UpstreamFailures: c.UpstreamFailures.Load(),
		UpstreamIgnored: c.UpstreamIgnored.Load(), UpstreamTCP: c.UpstreamTCP.Load(),
		Streams: c.Streams.Load(), StreamsRefused: c.StreamsRefused.Load(), StreamsIdle: c.StreamsIdle.Load(),
		OverRate: c.OverRate.Load(), RefusedName: c.RefusedName.Load(), RefusedType: c.RefusedType.Load(),
		RefusedTunnel: c.RefusedTunnel.Load(), UpstreamFolded: c.UpstreamFolded.Load(), AnswersRefused: c.AnswersRefused.Load(),
		RecordsForeign: c.RecordsForeign.Load(), RecordsRebound: c.RecordsRebound.Load(), GrantsRefused: c.GrantsRefused.Load(),
		Ungated: c.Ungated.Load(), Cached: c.Cached.Load(),
	}
}
