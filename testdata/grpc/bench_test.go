// Package grpc compares a call of aegis with the same call of grpc-go. It is a module of its own, so that aegis does not depend on
// gRPC:
//
//	cd testdata/grpc && go test -bench . -benchtime 1s
//
// The code in trade was generated from trade.proto by protoc-gen-go and protoc-gen-go-grpc.
package grpc

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/aegistrader/aegis/testdata/grpc/trade"
	"github.com/nats-io/nats-server/v2/server"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() != "" {
		fmt.Println("calls per second, and latencies that half and 99 of 100 calls stay below. x-grpc is our rate divided by that of gRPC.")
	}
	os.Exit(m.Run())
}

// An order has the fields of trade.Trade.
type order struct {
	Account  string  `json:"account"`
	Symbol   string  `json:"symbol"`
	Quantity int64   `json:"quantity"`
	Price    float64 `json:"price"`
	Buy      bool    `json:"buy"`
}

type echo struct {
	trade.UnimplementedOrdersServer
}

func (echo) Create(_ context.Context, t *trade.Trade) (*trade.Trade, error) { return t, nil }

// BenchmarkCall makes calls that carry a struct of five fields in each direction: with aegis in MessagePack through a NATS server,
// and with grpc-go in Protocol Buffers from the client straight to the server. Each has one connection on the loopback interface,
// and a deadline of 5 s for each call. All parties run in this process and share its cores.
func BenchmarkCall(b *testing.B) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, callers := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			versus(b, callers, callAegis(b), callGRPC(b))
		})
	}
}

// callAegis returns a function that makes one call with aegis.
func callAegis(b *testing.B) func() error {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		b.Fatal(err)
	}
	srv.Start()
	b.Cleanup(srv.Shutdown)
	if !srv.ReadyForConnections(10 * time.Second) {
		b.Fatal("the server does not accept connections")
	}
	service := func(name string) *aegis.Service {
		s, err := aegis.New(name, aegis.WithURL(srv.ClientURL()), aegis.WithPool(1))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = s.Stop(context.Background()) })
		return s
	}
	orders, client := service("orders"), service("client")
	err = aegis.Handle(orders, "create", func(_ context.Context, o order) (order, error) { return o, nil })
	if err != nil {
		b.Fatal(err)
	}
	if err := orders.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	return func() error {
		o := order{"ACC-1234", "AAPL", 100, 187.25, true}
		_, err := aegis.Call[order, order](context.Background(), client, "orders", "create", o) // within 5 s, the default
		return err
	}
}

// callGRPC returns a function that makes one call with grpc-go.
func callGRPC(b *testing.B) func() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer()
	trade.RegisterOrdersServer(srv, echo{})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		if err := <-served; err != nil {
			b.Error(err)
		}
	})
	client := trade.NewOrdersClient(conn)
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		t := &trade.Trade{Account: "ACC-1234", Symbol: "AAPL", Quantity: 100, Price: 187.25, Buy: true}
		_, err := client.Create(ctx, t)
		return err
	}
}

// versus runs b.N calls of aegis, and as many of gRPC, in alternating turns, so that both are exposed to the same noise. It reports
// the medians over the turns. x-grpc is the median of the turns' ratios of calls per second.
func versus(b *testing.B, callers int, runs ...func() error) {
	const turns = 12
	n := max(b.N/turns, 1)
	for _, run := range runs {
		load(b, callers, min(n, 5000), run) // fills the pools
	}
	var rate, p50, p99 [2][]float64
	var ratios []float64
	for turn := range turns {
		for i := range runs { // another one begins in each turn
			k := (i + turn) % len(runs)
			took := load(b, callers, n, runs[k])
			rate[k] = append(rate[k], took.rate)
			p50[k] = append(p50[k], took.p50)
			p99[k] = append(p99[k], took.p99)
		}
		ratios = append(ratios, rate[0][turn]/rate[1][turn])
	}
	for k, suffix := range []string{"", "-grpc"} {
		b.ReportMetric(median(rate[k]), "req/s"+suffix)
		b.ReportMetric(median(p50[k]), "p50-µs"+suffix)
		b.ReportMetric(median(p99[k]), "p99-µs"+suffix)
	}
	b.ReportMetric(median(ratios), "x-grpc")
	b.ReportMetric(0, "ns/op")
}

type sample struct{ rate, p50, p99 float64 }

// load makes at least n calls, from the given number of concurrent callers, and measures them.
func load(b *testing.B, callers, n int, call func() error) sample {
	each := (n + callers - 1) / callers
	latencies := make([]time.Duration, each*callers)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range callers {
		own := latencies[i*each : (i+1)*each]
		wg.Go(func() {
			for j := range own {
				t := time.Now()
				if err := call(); err != nil {
					b.Error(err)
					return
				}
				own[j] = time.Since(t)
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	slices.Sort(latencies)
	micros := func(part int) float64 { return float64(latencies[(len(latencies)-1)*part/100].Nanoseconds()) / 1000 }
	return sample{float64(len(latencies)) / took.Seconds(), micros(50), micros(99)}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}
