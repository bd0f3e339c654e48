// Package ports opens the host's side of published ports and keeps a table of them.
package ports
