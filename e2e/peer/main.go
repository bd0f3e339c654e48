// Command peer is the other side of the end-to-end tests: small servers, clients and load makers
// with exact answers, and the agent by which tests run commands inside a sandbox. Standard tools
// (curl, dig, iperf3 …) prove that ordinary programs work; peer proves what they do not show, such
// as which kind of close each end saw.
//
// Every client prints one JSON object on standard output, servers one per event.
// Nothing here knows about Sluice.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"sort"
	"strings"
	"sync"
	"syscall"
)

var commands = map[string]func(args []string) error{
	"agent":   agent,
	"ask":     ask,
	"serve":   serve,
	"dns":     dnsServe,
	"dial":    dial,
	"udp":     udpClient,
	"ways":    ways,
	"mapping": mapping,
	"forge":   forge,
	"get":     get,
	"h2":      h2,
	"short":   short,
	"hold":    hold,
	"hellos":  hellos,
	"knock":   knock,
	"xfer":    xfer,
	"synrst":  synrst,
	"reuse":   reuse,
	"eat-fds": eatDescriptors,
	"fetch":   fetch,
	"raw":     raw,
	"pause":   pause,
	"pour":    pour,
	"web":     web,
}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		var names []string
		for name := range commands {
			names = append(names, name)
		}
		sort.Strings(names)
		fmt.Fprintf(os.Stderr, "usage: peer %s …\n", strings.Join(names, "|"))
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "peer %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

// pause waits to be told to end, like the process that holds a pod's namespaces.
func pause([]string) error {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	<-told
	return nil
}

var printing sync.Mutex

// say prints v as one line of JSON. Lines of concurrent callers never mix.
func say(v any) {
	line, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	printing.Lock()
	defer printing.Unlock()
	os.Stdout.Write(append(line, '\n'))
}
