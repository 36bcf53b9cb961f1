// Command readme writes the Go of README.md into packages of the present directory, one for each block, so that all of it can be
// compiled. A block is a whole program, a few declarations, or statements of a function. It also writes what the first program prints
// to want.
package main

import (
	"fmt"
	"go/format"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// imports has the packages that blocks use, by their name in the code.
var imports = map[string]string{
	"aegis": "github.com/aegistrader/aegis", "context": "context", "errors": "errors", "fmt": "fmt", "http": "net/http", "os": "os",
	"signal": "os/signal", "syscall": "syscall", "testing": "testing", "time": "time", "server": "github.com/nats-io/nats-server/v2/server",
	"otel": "go.opentelemetry.io/otel", "propagation": "go.opentelemetry.io/otel/propagation", "trace": "go.opentelemetry.io/otel/trace",
}

// prelude declares what blocks take for granted.
const prelude = `
type (
	Order     struct{ SKU string }
	Receipt   struct{ ID string }
	Payment   struct{ Amount int }
	Portfolio struct{ ID string }
	Report    struct{ Trades int }
)

var (
	ctx         context.Context
	svc, client *aegis.Service
)

func book(context.Context, string, Payment) error { return nil }

func match(context.Context, Order) (Receipt, error) { return Receipt{}, nil }
`

func main() {
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	output := regexp.MustCompile("(?ms)^```text\n(.*?)^```$").FindSubmatch(text)
	if output == nil {
		log.Fatal("the README does not say what the first program prints")
	}
	if err := os.WriteFile("want", output[1], 0o644); err != nil {
		log.Fatal(err)
	}
	for i, m := range regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		code := m[1]
		if formatted, err := format.Source([]byte(code)); err != nil || string(formatted) != code {
			log.Fatalf("block %d of Go is not formatted: %v\n%s", i+1, err, code)
		}
		if !strings.HasPrefix(code, "package ") {
			declarations := strings.HasPrefix(code, "func ") || strings.HasPrefix(code, "var ") || strings.HasPrefix(code, "type ")
			if !declarations {
				code = "func block() error {\n" + code
				if !regexp.MustCompile("(?m)^return ").MatchString(code[strings.Index(code, "\n"):]) {
					code += "return nil\n"
				}
				code += "}\n"
			}
			code += prelude
			header := "package block\n\nimport (\n"
			for name, path := range imports {
				if regexp.MustCompile(`\b` + name + `\.`).MatchString(code) {
					header += fmt.Sprintf("\t%s %q\n", name, path)
				}
			}
			code = header + ")\n\n" + code
		}
		file := fmt.Sprintf("block%d/main.go", i+1)
		if strings.Contains(code, "*testing.T") {
			file = fmt.Sprintf("block%d/block_test.go", i+1)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			log.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(code), 0o644); err != nil {
			log.Fatal(err)
		}
	}
}
