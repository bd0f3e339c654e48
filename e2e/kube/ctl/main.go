// Command ctl starts the cluster of `make e2e-kube` and leaves it running, or removes it.
//
//	go run ./e2e/kube/ctl up [NODES]
//	go run ./e2e/kube/ctl down
//
// SLUICE_KUBE_DIR is its directory. As root, from the repository's root.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"sluice.dev/sluice/e2e/kube/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "ctl: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	config := cluster.Config{Source: "e2e/kube", Dir: os.Getenv("SLUICE_KUBE_DIR"), Log: log.Printf}
	switch {
	case len(args) == 1 && args[0] == "down":
		return cluster.Down(config)
	case len(args) == 0 || len(args) > 2 || args[0] != "up":
		return errors.New("usage: ctl up [NODES] | ctl down")
	case len(args) == 2:
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("NODES: %w", err)
		}
		config.Nodes = n
	}
	c, err := cluster.Up(ctx, config)
	if err != nil {
		return err
	}
	kubectl := c.Command(context.Background(), "kubectl")
	fmt.Printf("KUBECONFIG=%s PATH=%s:$PATH %s\n", c.Kubeconfig(), c.Bin(), strings.Join(kubectl.Args, " "))
	for _, n := range c.Nodes() {
		fmt.Println(strings.Join(n.Command(context.Background(), "bash").Args, " "))
	}
	return nil
}
