package ports

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// The ports of the host that --publish-auto leaves alone. The program that listens inside chooses
// the port, and programs on the host trust any server on its loopback: a sandbox that took the port
// of a database that happens not to run would receive the passwords of its clients. -p publishes
// any port, because the user who ran the sandbox asks for it.
//
//	below 1024                  the host's services', even where root or a sysctl may bind them
//	WellKnownPorts              those of services that programs look for on a loopback address
//	held by another, in either  a sandbox that had [::1]:P beside a service's 127.0.0.1:P would
//	family                      be asked first by a client of localhost
//
// A service that starts later in the other family goes unnoticed.

// WellKnownPorts apply to TCP and UDP alike, in ascending order.
var WellKnownPorts = []uint16{
	1080, 1194, 1433, 1434, 1521, 1812, 1813, 1883, // SOCKS, OpenVPN, SQL Server, Oracle, RADIUS, MQTT
	2049, 2181, 2375, 2376, 2377, 2379, 2380, // NFS, ZooKeeper, Docker, etcd
	3128, 3268, 3269, 3306, 3389, // Squid, Active Directory, MySQL, RDP
	4222, 4369, // NATS, Erlang's port mapper
	5353, 5355, 5432, 5433, 5671, 5672, 5900, 5901, 5984, // mDNS, LLMNR, PostgreSQL, AMQP, VNC, CouchDB
	6000, 6001, 6010, 6011, 6379, 6380, 6443, 6514, // X11 and ssh's X11, Redis, the Kubernetes API, syslog
	7687,                                           // Neo4j
	8125, 8200, 8300, 8301, 8302, 8500, 8501, 8600, // statsd, Vault, Consul
	9042, 9050, 9051, 9092, 9150, 9151, 9200, 9300, // Cassandra, Tor, Kafka, Elasticsearch
	10250, 10255, 11211, 11434, 15672, 16443, 26257, 27017, 27018, 27019, 33060, // kubelet, memcached, Ollama, RabbitMQ, microk8s, CockroachDB, MongoDB, MySQL X
}

// FirstAutoPort is the lowest port that --publish-auto takes.
const FirstAutoPort = 1024

// AutoPort is a port of the host that leads to a port the sandbox listens on.
type AutoPort struct {
	Proto string
	Host  netip.AddrPort
}

// ReservedPort returns an error that says why --publish-auto leaves a port alone, or nil if it may
// take it.
func ReservedPort(k AutoPort) error {
	port := k.Host.Port()
	if _, known := slices.BinarySearch(WellKnownPorts, port); known || port < FirstAutoPort {
		return fmt.Errorf("%s/%s is a well-known service's: publish it with -p %d:%d to have it", k.Host, k.Proto, port, port)
	}
	return nil
}

// HeldPort is a port of the host in either family.
type HeldPort struct {
	Proto string
	Port  uint16
}

// HeldByOthers returns the ports of the host that sockets not in the table are bound to (UDP) or
// listen on (TCP).
func (t *PortTable) HeldByOthers() map[HeldPort]bool {
	own := make(map[string]bool)
	for _, p := range t.List() {
		for _, l := range p.Listeners {
			var st unix.Stat_t
			if unix.Fstat(l.FD, &st) == nil {
				own[strconv.FormatUint(st.Ino, 10)] = true
			}
		}
	}
	held := make(map[HeldPort]bool)
	for _, proto := range []string{"tcp", "udp"} {
		for _, family := range []string{"", "6"} {
			eachSocket("/proc/thread-self/net/"+proto+family, proto, func(port uint16, inode string) {
				if !own[inode] {
					held[HeldPort{Proto: proto, Port: port}] = true
				}
			})
		}
	}
	return held
}
