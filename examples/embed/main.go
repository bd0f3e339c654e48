// Command embed runs a command under a policy and prints what became of its flows. A program needs
// no more than this to put the commands it runs behind the gate.
package main

import (
	"context"
	"fmt"
	"os"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/guest"
)

const gate = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: gate}
spec:
  defaultAction: reject
`

func main() {
	sandbox.Init("1.0") // before anything else: a sandbox's other processes are this binary too
	doc, err := policy.NewDocument("gate", []byte(gate))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status, err := sandbox.Run(context.Background(), sandbox.Config{
		Policy: policy.Given(doc),
		Guest:  guest.Config{Command: os.Args[1:]},
		Ended: func(flows api.FlowsResult) {
			for _, f := range flows.Ended {
				fmt.Println(f.IP.Destination, f.Verdict, f.Rule, f.Reason)
			}
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(status)
}
