// Package dhcp answers guests that configure themselves: DHCPv4 (RFC 2131),
// DHCPv6 (RFC 8415) and router advertisements (RFC 4861, 8106). Bytes in, bytes
// out: it knows no socket and no clock, and holds no state, because there is one
// guest and its addresses are given. Whoever asks gets them, every time.
//
//	guest ─ UDP 67  ── HandleV4 ───────────┐
//	guest ─ UDP 547 ── HandleV6 ───────────┼─ Config
//	guest ─ ICMPv6 RS ─ ValidSolicitation, RouterAdvertisement ┘
//
// What comes in is hostile: everything is parsed by a library that checks its
// bounds, after a bound on length that also bounds how deep options can nest.
// What is not understood, or meant for another server, is not answered.
package dhcp
