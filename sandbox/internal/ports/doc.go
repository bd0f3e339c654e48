// Package ports opens the host's side of published ports, and keeps the table of them.
package ports
