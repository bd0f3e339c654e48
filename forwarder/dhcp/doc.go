// Package dhcp answers guests that configure themselves: DHCPv4 (RFC 2131), DHCPv6 (RFC 8415) and
// router advertisements (RFC 4861, 8106). Bytes in, bytes out: it knows no socket and no clock, and
// holds no state, because there is one guest and its addresses are fixed. Every request gets the
// same ones.
//
//	guest ─ UDP 67  ── HandleV4 ───────────┐
//	guest ─ UDP 547 ── HandleV6 ───────────┼─ Config
//	guest ─ ICMPv6 RS ─ ValidSolicitation, RouterAdvertisement ┘
//
// Input is hostile: a bounds-checking library parses it, after a limit on length that also limits
// how deep options can nest. Messages that are not understood, or meant for another server, are not
// answered.
package dhcp
