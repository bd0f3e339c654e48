// Bench measures sluice against every other user-mode network found on PATH, and against the kernel
// alone, alternating between them in one run. It drives built binaries only.
//
//	bench (supervisor, supervise.go)      sets what a run needs and gives it back
//	└─ bench inside (inside.go)         PID 1 of namespaces of its own: nothing outlives it
//	   ├─ bench serve (serve.go)        the far side: 127.0.0.1 and ::1 of the namespace "host"
//	   ├─ bench agent                   "host": the same namespace, no proxy: the kernel's limit
//	   ├─ bench hold → bench agent      "veth": a namespace of its own and a cable
//	   ├─ sluice run -- bench agent     ┐
//	   ├─ pasta -- bench agent          ├ the same agent behind each candidate
//	   └─ slirp4netns (bench hold)      ┘
//
// The agent (agent.go) is the client of every cell; it takes one JSON request a line on standard
// input and ends with it. Generator and far side use blocking system calls on their own threads
// (raw.go), as a C program would, so that Go's scheduler and poller are not measured.
//
// A probe (probes.go) is one measurement of one candidate and fills one or more cells. Each round
// runs every probe on every candidate, starting with a different one, so that a slow minute of the
// machine hits all alike. Medians are judged against the project's targets (targets.go) and written
// as a table, JSON and a chart (table.go, chart.go).
package main
